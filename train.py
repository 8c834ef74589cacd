"""train.py: deep supervision fine-tuning (DFT) of an English-centric LLM.

    python train.py                                         the demo: 3M parameters, CPU, 2 minutes
    python train.py --model DIR --data zh.jsonl                                             one GPU
    torchrun --nproc_per_node 8 train.py --model DIR --data zh.jsonl --out runs/zh       eight GPUs
    python train.py --model DIR --data zh.jsonl --dry_run --world_size 8       estimate the cost

DIR is a Hugging Face folder with safetensors weights (LLaMA-2, LLaMA-3, SmolLM2, Gemma-2). The data
is JSONL or a JSON array of records with the keys instruction, input, output in the target language
and instruction_en, input_en, output_en in English. Methods:

    sft            train on the English side only
    tft            train on the target language only: ordinary fine-tuning
    dft-logits     tft; also layer i predicts the English query and layer j the English answer
    dft-feature    tft; also the pooled states of layers i and j are aligned with the English ones
    qalign         translate queries into English (Zhu et al. 2024); afterwards run sft on OUT/model

OUT/model is the result, a Hugging Face folder. OUT/metrics.jsonl has one line per step and
OUT/settings.json the settings. To resume a stopped run, rerun the command with the same --out.
Without --model the demo model is trained, with settings that differ from the defaults below.
"""
import argparse
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import (Record, Tokenizer, batch_of, chat_template, english_records, fingerprint,
                  make_records, micro_batches, read_parallel, steps_per_epoch)
from dft import DFT, TERMS, Method, choose_layers, lay_out
from eval import compare, read_questions
from model import (DTYPES, Config, InputError, Packed, Transformer, check_finite, check_weights,
                   load_weights, pick_device, read_json, save, write_json)

SIGNALS = {"sft": ("none", "none"), "tft": ("none", "none"), "dft-logits": ("logits", "logits"),
           "dft-feature": ("feature", "feature"), "qalign": ("none", "none")}   # method: (lc, et)
MAX_BAD_STEPS = 10      # in a row, with a loss or gradient that is not finite: the run ends


# ------------------------------------------------------------------------------------------ one run

def main(argv=None) -> None:
    args = parse(argv)
    config = Config.read(args.model)
    method = make_method(args, config)
    if args.max_length > config.max_position_embeddings:
        raise InputError(f"--max_length is {args.max_length}, expected at most the "
                         f"{config.max_position_embeddings} positions of {args.model}")
    if args.dry_run:
        return print(plan(args, config, method))
    ranks = start(args)

    # Lock the folder of the run before using it.
    out, metrics = open_folder(args, ranks)
    tokenizer, result = Tokenizer(config), os.path.join(out, "model")
    with torch.device("meta"):                  # what is malformed should fail now
        check_weights(Transformer(config), args.model)
    if args.test:
        if not os.path.isfile(args.test):       # a pipe could not be read again after training
            raise InputError(f"{args.test}: No such file, or not a regular one")
        read_questions(args.test)
    records, val, counts = read_records(args, method, tokenizer)
    say(f"data      {args.data}: {counts}")
    steps = args.steps or args.epochs * steps_per_epoch(len(records), args.batch_size)
    parts = ranks.first(lambda: [repr(dataclasses.replace(config, raw={}, files={}, folder="")),
                                 digests(args.model)])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    settings = argparse.Namespace(**{**vars(args), "out": out, "steps": steps, "ranks": ranks.world,
                                     "digest of the records": fingerprint(records),
                                     "digest of the model": digest})
    path = os.path.join(out, "settings.json")
    stored = ranks.first(lambda: read_json(path) if os.path.exists(path) else None)
    if stored is not None:
        compare_settings(settings, stored, path)
    names = ("config.json", "model.safetensors")
    if stored and all(os.path.exists(os.path.join(result, name)) for name in names):
        say("finished  this run is already complete; use a new --out to train again")
        return report(args, result, ranks)
    if os.path.exists(result) or any(os.path.isfile(os.path.join(out, name)) for name in (
            "model.partial", "checkpoints")):
        raise InputError(f"{out}: model, model.partial or checkpoints is in the way of this run; "
                         "remove it")

    model = build(config, method, args, ranks)
    optimizer = make_optimizer(model, args)
    i, j = method.lc_layer, method.et_layer
    if stored:
        i, j = stored["lc_layer"], stored["et_layer"]
        if not {i, j} <= set(range(config.num_hidden_layers + 1)):
            raise InputError(f"{path}: lc_layer is {i!r}, et_layer is {j!r}; expected layers")
    elif method.signals() and not (i and j):
        auto_i, auto_j, why = read_layers(model, records)
        j = j or max(auto_j, i)
        i = i or min(auto_i, j)
        say(f"layers    i = {i}, j = {j} of {config.num_hidden_layers}; auto: {why}")
    model.method = dataclasses.replace(method, lc_layer=i, et_layer=j)
    first = int((args.train_layers or "1").split("-")[0])
    if any(model.method.layer(term) < first for term in method.signals()):
        raise InputError(f"--train_layers {args.train_layers}: a loss at layer i = {i} or j = {j} "
                         "would train nothing; begin with a layer below, or use --lc none")
    settings.lc_layer, settings.et_layer = i, j         # the settings are final from here on
    if ranks.rank == 0:
        write_json(vars(settings), path)
    say(f"settings  {path}")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"run       {steps:,} steps of {min(args.batch_size, len(records))} records, "
        f"{parameters:,} parameters, on {ranks.world} x {ranks.device.type}")
    begin = load_checkpoint(settings, model, optimizer, ranks) if stored else 0
    if metrics:                                 # steps after the checkpoint are run again
        keep_lines(metrics, begin)

    stop = []                                   # times of stop signals
    handle_signals(stop)
    try:
        done = train(model, optimizer, records, val, begin, metrics, settings, ranks, stop)
        if done < steps:
            say(f"stopped   by a signal after step {done:,} of {steps:,}; to resume, give the "
                f"same command with --out {out}")
            return
        skipped = steps - updates(optimizer)
        if skipped == steps:
            raise FloatingPointError("no step had a finite loss and gradient, so the model is not "
                                     "saved; try a lower --lr or --dtype fp32")
        check_finite(model.model, "the trained model, which is not saved")
        save(model.model, result, DTYPES[args.dtype], chat_template(bool(tokenizer.bos)))
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out}: {error}; {last_checkpoint(out)}; resolve this and give the same "
                      f"command with --out {out} to resume") from None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if skipped:
        say(f"skipped   {skipped} of {steps} steps: loss or gradient not finite")
    report(args, result, ranks)


def keep_lines(metrics, steps: int) -> None:
    """Cut metrics.jsonl after the lines of the first steps, or before one that is damaged."""
    metrics.seek(0)
    for step in range(1, steps + 1):
        begin, line = metrics.tell(), metrics.readline()
        try:
            intact = line.endswith(b"\n") and json.loads(line)["step"] == step
        except (ValueError, TypeError, KeyError):
            intact = False
        if not intact:
            shutil.copyfile(metrics.name, f"{metrics.name}.damaged")
            metrics.seek(begin)
            say(f"warning   {metrics.name} has only {step - 1} intact lines of the {steps} before "
                f"this; all of it is in {metrics.name}.damaged")
            break
    metrics.truncate()


def train(model: DFT, optimizer, records: list, val: list, begin: int, metrics, settings,
          ranks: "Ranks", stop: list) -> int:
    """The training loop, after `begin` steps, to the last step or to a stop signal. Returns how
    many steps are done."""
    method, steps, done, bad = model.method, settings.steps, begin, 0
    per_epoch = steps_per_epoch(len(records), settings.batch_size)
    bar = tqdm(range(begin, steps), settings.method, total=steps, initial=begin, unit="step",
               disable=ranks.rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in bar:                            # counted from 0
        began = time.perf_counter()

        # Learning rate.
        lr = learning_rate(step, steps, settings.lr, settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The records of this step, and of those the micro-batches of this rank.
        numbers = batch_of(step, len(records), settings.batch_size, settings.seed)
        batches = rank_batches([records[n] for n in numbers], model, settings, ranks)

        # The denominator of each loss: its number of tokens or pairs in the global batch.
        local = []
        for term in TERMS:
            local.append(sum(b.counts.get(term, 0) for b in batches))
        *counts, tokens = ranks.total([*local, sum(b.tokens for b in batches)])

        # Forward and backward.
        sums = torch.zeros(len(TERMS), device=ranks.device)
        for b in batches:
            loss = 0.0
            for term, value in model(b).items():
                n = TERMS.index(term)
                loss = loss + method.weight(term) * value / max(counts[n], 1)
                sums[n] += value.detach()
            (loss * ranks.world).backward()     # undoes FSDP's averaging over ranks
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        *totals, stopping = ranks.total([*sums.tolist(), len(stop)])

        # Update the weights, unless the loss or the gradient is not finite (on any rank).
        finite = math.isfinite(norm + sum(totals))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        bad = 0 if finite else bad + 1          # in a row
        done = step + 1

        # Log.
        means = dict.fromkeys(TERMS)            # None: loss not used, or step skipped
        for term, value, count in zip(TERMS, totals, counts):
            if finite and (term == "tft" or term in method.signals()):
                means[term] = value / max(count, 1)
        loss = sum(method.weight(term) * (means[term] or 0) for term in TERMS) if finite else None
        seconds = time.perf_counter() - began
        line = dict(step=done, epoch=round(done / per_epoch, 4), loss=loss, **means, lr=lr,
                    grad_norm=norm if finite else None, tokens=int(tokens),
                    tokens_per_s=round(tokens / seconds, 1), seconds=round(seconds, 4),
                    peak_mem_mib=peak_memory(ranks.device), skipped=done - updates(optimizer))
        if val and (done % settings.val_every == 0 or done == steps):
            line |= validate(model, val, settings, ranks)
        if metrics:
            metrics.write(json.dumps(line).encode() + b"\n")
            metrics.flush()
            shown = {key: f"{line[key]:.3f}" for key in ("loss", *TERMS, "val_loss")
                     if line.get(key) is not None}
            bar.set_postfix({**shown, "tok/s": f"{line['tokens_per_s']:,.0f}"}, refresh=False)
        if not finite:
            problem = f"step {done}: loss or gradient not finite, {bad} in a row"
            say(f"skipped   {problem}")
            if bad == MAX_BAD_STEPS:
                raise FloatingPointError(f"{problem}; {last_checkpoint(settings.out)}; try --lr "
                                         f"below {settings.lr} or --dtype fp32, with a new --out")

        # Save, and stop if a signal asked for it.
        due = settings.save_every and done % settings.save_every == 0 and finite
        if due or stopping or done == steps:
            if metrics:
                os.fsync(metrics.fileno())      # metrics reach the disk before the checkpoint
            save_checkpoint(settings, model, optimizer, done, ranks)
        if stopping:
            break
    return done


def updates(optimizer) -> int:
    """How many steps changed the weights: all but the skipped ones."""
    return int(next(iter(optimizer.state.values()))["step"])


def rank_batches(records: list, model: DFT, settings, ranks: "Ranks") -> list:
    """The micro-batches of this rank. FSDP requires the same number on every rank; an empty one is
    replaced by a single token without a loss."""
    method, config = model.method, model.model.config
    L, idle = config.num_hidden_layers, [Record([config.bos_token_id], [])]
    sizes = [lay_out([record], method, L).tokens for record in records]
    parts = micro_batches(sizes, settings.micro_batch_tokens, ranks.world)[ranks.rank::ranks.world]
    batches = []
    for part in parts:
        batches.append(lay_out([records[n] for n in part] or idle, method, L))
    return batches


@torch.no_grad()
def validate(model: DFT, val: list, settings, ranks: "Ranks") -> dict:
    """Losses on held-out records: {"val_loss": their weighted sum, "val_tft": mean, ...}."""
    sums, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0)
    for b in rank_batches(val, model, settings, ranks):
        for term, value in model(b).items():
            sums[term] += value.item()
            counts[term] += b.counts[term]
    totals = ranks.total([*sums.values(), *counts.values()])
    means, loss = {}, 0.0
    for term, total, count in zip(TERMS, totals, totals[len(TERMS):]):
        if count:
            means[f"val_{term}"] = total / count
            loss += model.method.weight(term) * total / count
    return {"val_loss": loss, **means}


# ----------------------------------------------------------------- supporting code: ranks and model

@dataclasses.dataclass
class Ranks:
    """This process among those of torchrun. `group` is a gloo group, None without torchrun."""
    device: torch.device
    rank: int = 0
    world: int = 1
    group: object = None

    def total(self, values: list) -> list:
        """Each number summed over the ranks."""
        if self.world == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def first(self, action):
        """What action() returns on rank 0, on every rank."""
        answer = [action() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(answer, group=self.group)
        return answer[0]


def start(args) -> Ranks:
    """Choose the device and, under torchrun, set up torch.distributed."""
    kind = pick_device(args.device)
    if kind == "cpu":
        keep_freed_memory()
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        if args.cpu_offload:
            raise InputError("--cpu_offload needs torchrun; on one GPU: torchrun --nproc_per_node "
                             "1 train.py ...")
        return Ranks(torch.device(kind))
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Ranks(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks. If they went back to the system, their pages would be
    cleared when they are used again, which costs a fifth of a training step on CPUs."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                     # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, -1)                    # M_TRIM_THRESHOLD: the heap never shrinks


def build(config: Config, method: Method, args, ranks: Ranks) -> DFT:
    """The model with its weights in fp32, sharded over the ranks under torchrun.

    FSDP2: each layer is a group; embedding, final norm and head are in one, the root's, so that a
    tied head stays tied. Weights are gathered in the compute dtype, gradients reduced in fp32. Each
    rank reads only its own rows.
    """
    with torch.device("meta"):
        model = DFT(Transformer(config), method)
    freeze(model.model, args)
    model.model.compute_dtype = DTYPES[args.dtype]
    for layer in model.model.layers:
        layer.checkpointing = args.activation_checkpointing
    cuda = ranks.device.type == "cuda"
    if args.compile == "yes" or args.compile == "auto" and cuda:
        model.compile_parts(flex=cuda)
    if ranks.group:
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        dtypes = MixedPrecisionPolicy(DTYPES[args.dtype], torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=cuda) if args.cpu_offload else OffloadPolicy()
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=dtypes, offload_policy=offload)
    model.to_empty(device="cpu" if args.cpu_offload else ranks.device)
    load_weights(model.model, args.model, ranks.group)
    return model


def freeze(model: Transformer, args) -> None:
    """Leave only the weights of --train_layers and --train_modules trainable."""
    if args.train_layers is None and args.train_modules == "all":
        return
    L = model.config.num_hidden_layers
    found = re.fullmatch(r"(\d+)-(\d+)", args.train_layers or f"1-{L}")
    first, last = (int(n) for n in found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= L:
        raise InputError(f"--train_layers is {args.train_layers}, expected A-B within 1-{L}")
    module = {"all": "", "attention": ".self_attn.", "mlp": ".mlp."}[args.train_modules]
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0
        p.requires_grad_(first <= layer <= last and module in name)


def make_optimizer(model: DFT, args) -> torch.optim.AdamW:
    """AdamW whose moments already exist, so that a checkpoint can be loaded into them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    for p in trained:
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                  exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of a step (from 0): (1) warm-up rises evenly to the peak, (2) half a cosine falls to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def read_records(args, method: Method, tokenizer: Tokenizer):
    """(records to train on, held-out records, Counts of the former) of a run."""
    side = {"sft": "english", "qalign": "translation"}.get(args.method, "target")
    side = "both" if method.signals() else side
    features = "feature" in method.signals().values()
    rows, val = read_parallel(args.data, args.data_en), []
    if args.val:
        val, counts = make_records(read_parallel(args.val), tokenizer, side, args.max_length,
                                   features)
        say(f"val       {args.val}: {counts}")
    records, counts = make_records(rows, tokenizer, side, args.max_length, features)
    if args.english and side != "english":
        records += english_records(rows, tokenizer, args.max_length, args.english, args.seed,
                                   counts)
    return records, val, counts


def read_layers(model: DFT, records: list):
    """choose_layers() on the mean entropy over 16 target-language queries, without template."""
    packed, indices = Packed(), []
    for record in [record for record in records if record.query_en is not None][:16]:
        prompt = packed.add(record.prompt, depth=model.model.config.num_hidden_layers)
        indices += prompt[slice(*record.query)]
    entropy, _ = model((packed, indices, torch.empty(len(indices), 0, dtype=torch.long)))
    return choose_layers(entropy.mean(1).tolist())


def peak_memory(device) -> int:
    """The most memory used so far in MiB, by the GPU's allocator or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # macOS: bytes, Linux: KiB
    return peak >> 20 if sys.platform == "darwin" else peak >> 10


def handle_signals(stop: list) -> None:
    """Let SIGINT, SIGTERM and SIGUSR1 append to `stop`; a second SIGINT interrupts at once."""
    def receive(number, frame):
        # torchrun repeats a ^C that the ranks have had already, so two within a second count as one
        if number == signal.SIGINT and stop and time.monotonic() > stop[-1] + 1:
            raise KeyboardInterrupt
        stop.append(time.monotonic())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, receive)


def say(text: str) -> None:
    """Print a line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def report(args, result: str, ranks: Ranks) -> None:
    """Rank 0 prints the scores before and after training, and what to try next."""
    if ranks.group:
        dist.destroy_process_group()
    if ranks.rank > 0:
        return
    path = os.path.join(os.path.dirname(result), "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if "val_loss" in line]
        if lines:
            best = min(lines, key=lambda line: line["val_loss"])
            say(f"val       the loss on held-out records was lowest at step {best['step']:,}: "
                f"{best['val_loss']:.4f}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a line is damaged ({error}); the model is in {result}") from None
    if args.test:
        table = compare({"before": args.model, "after": result}, args.test, ranks.device.type,
                        DTYPES[args.dtype])
        say(f"\nExact match on {args.test}, and the share of answers in the language that was "
            f"asked:\n\n{table}")
    data = args.test or args.data
    say(f"\nThe model is in {result}. Next, ask it something, or look at its layers:\n"
        f"  python eval.py --model {result} --prompt 'a question'\n"
        f"  python eval.py --model {args.model} {result} --task lens --data {data}")


# ------------------------------------------------------------- supporting code: the folder of a run

# Settings that may change when a run is resumed: paths, and how the same result is computed.
FREE = ("model", "data", "data_en", "test", "val", "val_every", "out", "epochs", "device", "ranks",
        "cpu_offload", "compile", "micro_batch_tokens", "activation_checkpointing", "save_every",
        "keep", "dry_run", "world_size")


def open_folder(args, ranks: Ranks):
    """(the folder of the run, on rank 0 its metrics.jsonl). The file stays locked until this
    process ends: two processes never train in one folder."""
    name = f"{args.method}-{os.path.basename(os.path.normpath(args.model))}"
    out = args.out or os.path.join("runs", f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    metrics = None
    if ranks.rank == 0:
        while not args.out and os.path.exists(out):
            out += "-again"
        try:
            os.makedirs(out, exist_ok=True)
            names = [name for name in sorted(os.listdir(out)) if name != "settings.json.tmp"
                     and os.path.getsize(os.path.join(out, name))]      # what a killed start left
            if names and "settings.json" not in names:
                raise InputError(f"--out {out} has {', '.join(names[:3])} but no settings.json, so "
                                 "it is not the folder of a run; give another")
            metrics = open(os.path.join(out, "metrics.jsonl"), "a+b")
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another process trains in it; give another") from None
        except OSError as error:
            raise InputError(f"--out {out}: {error.filename}: {error.strerror}") from None
    return ranks.first(lambda: out), metrics


def compare_settings(settings, stored: dict, path: str) -> None:
    """InputError if a setting that changes the result differs from the stored one."""
    for key, value in vars(settings).items():
        if key not in stored or key not in FREE and value not in ("auto", stored[key]) and (
                str(value) != str(stored[key])):
            raise InputError(f"{key} is {value}, but {stored.get(key)} in {path}; resume with the "
                             "same value, or give a new --out")


def save_checkpoint(settings, model: DFT, optimizer, step: int, ranks: Ranks) -> None:
    """Write OUT/checkpoints/step-NNNNNN with torch.distributed.checkpoint; all ranks call it.

    The folder is written as step-NNNNNN.partial and renamed when it is complete, so that an error
    leaves the older checkpoints as they were.
    """
    out, began = settings.out, time.perf_counter()
    folder = os.path.join(out, "checkpoints", f"step-{step:06d}")
    partial, tensors = folder + ".partial", checkpoint_tensors(model, optimizer)
    # Each rank writes one file per layer with its rows, and one file for the rest.
    numbers = {name: 2 + int(name.split(".")[2]) if ".layers." in name else 1 for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(partial, numbers, save_distributed=True)
    if ranks.rank == 0:
        os.stat(out)                            # an error if the folder of the run was removed
        shutil.rmtree(partial, ignore_errors=True)
    ranks.total([0])                            # wait for rank 0
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=not ranks.group)
    except CheckpointException as error:        # on all ranks; the one that failed reports it
        rank, (problem, _) = next(iter(error.failures.items()))
        raise (problem if rank == ranks.rank else SystemExit(2)) from None
    if ranks.rank == 0:                         # all ranks have written by now
        state = dict(step=step, updates=updates(optimizer), settings=vars(settings),
                     files=digests(partial))
        write_json(state, os.path.join(partial, "state.json"))
        shutil.rmtree(folder, ignore_errors=True)           # a damaged one of the same step
        os.rename(partial, folder)
        done = checkpoints(out)
        for old in done[:max(0, done.index(folder) + 1 - settings.keep)]:
            shutil.rmtree(old, ignore_errors=True)
    say(f"saved     {folder} in {time.perf_counter() - began:.1f} s")


def load_checkpoint(settings, model: DFT, optimizer, ranks: Ranks) -> int:
    """Load the newest intact checkpoint into model and optimizer, and return its step. Any number
    of ranks may have written it."""
    found = ranks.first(lambda: checkpoints(settings.out))
    for folder in reversed(found):
        state = ranks.first(lambda: read_state(folder))
        if state is None:
            say(f"warning   {folder} is skipped: its files are not those that were saved")
            continue
        compare_settings(settings, state["settings"], os.path.join(folder, "state.json"))
        dcp.load(checkpoint_tensors(model, optimizer), process_group=ranks.group,
                 storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=not ranks.group)
        for moments in optimizer.state.values():
            moments["step"].fill_(state["updates"])
        say(f"resume    from {folder}, after step {state['step']:,}")
        return state["step"]
    if found:
        raise InputError(f"{settings.out}: none of its checkpoints is intact; remove its folder "
                         "checkpoints to start from the first step")
    say(f"resume    from the first step: {settings.out} has no checkpoint")
    return 0


def checkpoint_tensors(model: DFT, optimizer) -> dict:
    """{name: tensor} of all that a checkpoint holds: trained weights and their moments in AdamW."""
    tensors = {}
    for name, p in model.named_parameters():
        if p in optimizer.state:
            tensors[name] = p.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = optimizer.state[p][moment]
    return tensors


def checkpoints(out: str) -> list:
    """The complete checkpoints of a run, oldest first."""
    paths = glob.glob(os.path.join(glob.escape(out), "checkpoints", "step-*"))
    paths = [path for path in paths if re.fullmatch(r"step-\d{6,}", os.path.basename(path))]
    return sorted(paths, key=lambda path: (len(path), path))        # by number


def last_checkpoint(out: str) -> str:
    """The newest checkpoint, as a phrase."""
    return f"the last checkpoint is {(checkpoints(out) or ['none'])[-1]}"


def read_state(folder: str) -> dict | None:
    """The state.json of a checkpoint, None if the files are not those that were saved."""
    try:
        state = read_json(os.path.join(folder, "state.json"))
        intact = (0 <= state["updates"] <= state["step"] == int(folder.rsplit("-", 1)[1])
                  and isinstance(state["settings"], dict) and state["files"] == digests(folder))
        return state if intact else None
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return None


def digests(folder: str) -> dict:
    """{file: SHA-256} of the weight files of a checkpoint."""
    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    with ThreadPoolExecutor() as pool:
        return dict(zip(map(os.path.basename, paths), pool.map(digest, paths)))


# ------------------------------------------------------------------- supporting code: cost estimate

def plan(args, config: Config, method: Method) -> str:
    """What a run would cost, from config.json and the data."""
    with torch.device("meta"):
        model = Transformer(config)
    freeze(model, args)
    n = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    records, _, counts = read_records(args, method, Tokenizer(config))
    tokens = lay_out(records, method, config.num_hidden_layers).tokens / len(records)
    steps = args.steps or args.epochs * steps_per_epoch(len(records), args.batch_size)

    # 6 FLOPs for each weight and token (Kaplan et al. 2020), as if all tokens passed all layers.
    flops = 6 * n * tokens * steps * min(args.batch_size, len(records))
    # Weight, gradient and two moments in fp32; one GPU also keeps the weights in the compute dtype.
    low = DTYPES[args.dtype].itemsize
    states = 0 if args.cpu_offload else (4 * n + 12 * trained) / args.world_size
    states += low * n if args.world_size == 1 else 0
    return (f"model     {args.model}: {n:,} parameters, {trained:,} of them trained\n"
            f"data      {counts}; {tokens:.0f} tokens per record\n"
            f"time      {steps:,} steps, at most {flops:.2e} FLOPs: "
            f"{flops / 0.4 / 989e12 / 3600:.2f} GPU hours at 40 % of the peak of an H100 "
            "(989 TFLOP/s), which is an assumption\n"
            f"disk      {12e-9 * trained * (args.keep + 1):,.1f} GB of checkpoints, "
            f"{low * n / 1e9:,.1f} GB for the model\n"
            f"memory    {states / 1e9:,.1f} GB on each of {args.world_size} GPUs for weights, "
            "gradients and moments, and as much as the activations of --micro_batch_tokens take")


# -------------------------------------------------------------------- supporting code: command line

# Without --model the demo runs, with settings that suit 3M parameters and two minutes.
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo")
DEMO = dict(model=os.path.join(HERE, "model"), data=os.path.join(HERE, "train.jsonl"),
            test=os.path.join(HERE, "test.jsonl"), dtype="fp32", batch_size=32, lr=5e-4, epochs=3,
            english=1.0)

# What other trainers call our options
ELSEWHERE = {"--learning_rate": "--lr", "--num_train_epochs": "--epochs", "--output_dir": "--out",
             "--per_device_train_batch_size": "--batch_size", "--max_steps": "--steps",
             "--model_name_or_path": "--model", "--gradient_checkpointing":
             "--activation_checkpointing", "--warmup_ratio": "--warmup"}


def parse(argv=None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--model DIR --data FILE] [...]", description=__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 100))

    def add(name, default, text, **more):
        """An option of the latest group; its type is that of its default."""
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif "choices" not in more:
            more = {"type": str if default is None else type(default), "metavar": "N", **more}
        text += "" if default is None else f" (default: {default})"
        parser._action_groups[-1].add_argument(name, default=default, help=text, **more)

    parser.add_argument_group("data")
    add("--model", None, "Hugging Face folder to fine-tune; default: the demo", metavar="DIR")
    add("--data", None, "records to train on", metavar="FILE")
    add("--data_en", None, "English side of --data, joined by id or line by line", metavar="FILE")
    add("--test", None, "questions to answer before and after training", metavar="FILE")
    add("--max_length", 512, "maximum tokens per sequence; longer answers are cut and counted")
    add("--english", 0.0, "fraction of the distinct English sides to add as records of their own, "
        "which preserves the model's English")
    add("--val", None, "held-out records, in the format of --data", metavar="FILE")
    add("--val_every", 100, "compute the loss on held-out records every N steps")
    parser.add_argument_group("method")
    kinds = ["none", "logits", "feature"]
    add("--method", "dft-logits", "what is supervised, see above", choices=SIGNALS)
    add("--lc", None, "override how --method computes L_LC, at layer i", choices=kinds)
    add("--et", None, "override how --method computes L_ET, at layer j", choices=kinds)
    add("--lc_layer", "auto", "layer i, 1 or more; auto chooses i and j from the logit lens")
    add("--et_layer", "auto", "layer j, i or more")
    add("--lc_weight", 1.0, "weight of the language conversion loss")
    add("--et_weight", 1.0, "weight of the English thinking loss")
    add("--align", "branch", "logits: predict the English text token by token after the prompt, "
        "or at the positions of the target text", choices=["branch", "position"])
    add("--pool", "mean", "features: mean over tokens, or the last one", choices=["mean", "last"])
    add("--lens_norm", True, "logits: apply the final norm before the head at layers i and j")
    add("--english_grad", False, "features: train through the English side as well")
    add("--train_layers", None, "train only layers A to B; embedding, head and final norm are "
        "frozen, too", metavar="A-B")
    add("--train_modules", "all", "train only these weights of each layer",
        choices=["all", "attention", "mlp"])
    parser.add_argument_group("optimization")
    add("--epochs", 3, "number of passes over the data")
    add("--steps", None, "number of steps, overrides --epochs", type=int)
    add("--batch_size", 128, "records per step, over all GPUs")
    add("--lr", 2e-5, "peak learning rate of AdamW")
    add("--warmup", 0.03, "fraction of the steps for linear warm-up; then cosine decay to 0")
    add("--weight_decay", 0.0, "weight decay of AdamW")
    add("--clip", 1.0, "maximum gradient norm")
    add("--seed", 0, "random seed (order of the records, --english)")
    parser.add_argument_group("run")
    add("--out", None, "run folder; an existing run is resumed (default: new in runs/)",
        metavar="DIR")
    add("--device", "auto", "auto: CUDA if available", choices=["auto", "cpu", "cuda"])
    add("--dtype", "bf16", "dtype of computation and of the saved model; weights are kept in fp32",
        choices=DTYPES)
    add("--compile", "auto", "use torch.compile and FlexAttention; auto: yes on GPUs, no on CPUs",
        choices=["auto", "yes", "no"])
    add("--micro_batch_tokens", 4096, "tokens per GPU and forward pass: more are faster on GPUs, "
        "fewer save memory, the result is the same")
    add("--activation_checkpointing", False, "recompute layers in backward to save memory")
    add("--cpu_offload", False, "keep weights, gradients, moments in host memory; needs torchrun")
    add("--save_every", 100, "steps between checkpoints; 0: only at the end or after a signal")
    add("--keep", 2, "newest checkpoints to keep, 12 bytes per parameter each")
    parser.add_argument_group("cost estimate")
    add("--dry_run", False, "print what the run would cost and stop; needs no weights")
    add("--world_size", 1, "number of GPUs to plan for")

    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = {name: name for name in parser._option_string_actions} | ELSEWHERE
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        hint = f"; did you mean {names[close[0]]}?" if close else "; see --help"
        raise InputError(f"{unknown[0]}: no such option{hint}")
    if known.model is None:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    lc, et = SIGNALS[args.method]
    args.lc, args.et = args.lc or lc, args.et or et
    if not args.data:
        raise InputError("--model needs --data FILE, the records to train on")
    if args.method in ("sft", "qalign") and (args.lc, args.et) != ("none", "none"):
        raise InputError(f"--method {args.method} takes no --lc and --et")
    logits, features = "logits" in (args.lc, args.et), "feature" in (args.lc, args.et)
    has_effect = dict(lc_layer=args.lc != "none", lc_weight=args.lc != "none", align=logits,
                      et_layer=args.et != "none", et_weight=args.et != "none", lens_norm=logits,
                      pool=features, english_grad=features, world_size=args.dry_run,
                      val_every=args.val, english=args.method != "sft",
                      data_en=args.method != "tft" or args.english)
    for key, used in has_effect.items():
        if not used and getattr(args, key) != parser.get_default(key):
            raise InputError(f"--{key} has no effect with these settings; leave it out")
    if args.data_en and os.path.realpath(args.data) == os.path.realpath(args.data_en) or (
            args.out == ""):
        raise InputError("--data_en: expected another file than --data; --out: expected a folder")
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not (
                0 < value < math.inf or value == 0 and key in MAY_BE_0):
            least = "at least" if key in MAY_BE_0 else "more than"
            raise InputError(f"--{key} is {value}, expected {least} 0")
    for key in ("warmup", "english"):
        if getattr(args, key) > 1:
            raise InputError(f"--{key} is {getattr(args, key)}, expected a fraction from 0 to 1")
    return args


MAY_BE_0 = ("lc_weight", "et_weight", "warmup", "weight_decay", "seed", "save_every", "dry_run",
            "lens_norm", "english_grad", "activation_checkpointing", "cpu_offload", "english")


def make_method(args, config: Config) -> Method:
    """The Method of the command line; a layer that is to be read off the lens is 0."""
    layers = []
    for key in ("lc_layer", "et_layer"):
        value, L = getattr(args, key), config.num_hidden_layers
        if value != "auto" and not (value.isdecimal() and 1 <= int(value) <= L):
            raise InputError(f"--{key} is {value}, expected auto or a layer from 1 to {L}")
        layers.append(0 if value == "auto" else int(value))
    return Method(args.lc, args.et, *layers, args.lc_weight, args.et_weight, args.align, args.pool,
                  args.lens_norm, args.english_grad)


class Output:
    """stdout or stderr, flushed at once; once its reader is gone (train.py | head), a sink."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        self.stream.reconfigure(errors="backslashreplace")      # for terminals without UTF-8

    def write(self, text):
        if text.startswith("\r") and not self.stream.isatty():      # progress, in a log file
            text = text.strip("\r ") and text.strip("\r ") + "\n"
        try:
            print(text, end="", file=self.stream, flush=True)
        except OSError:
            self.stream = open(os.devnull, "w")

    def flush(self):
        """write() has done it."""

    def __getattr__(self, name):
        return getattr(self.stream, name)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # of a single process
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except (InputError, FloatingPointError, OSError) as error:
        if isinstance(error, OSError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)       # the others are the same on all ranks
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except RuntimeError as error:
        if "gloo" in str(error):
            sys.exit(f"rank {os.environ['RANK']}: the connection to another rank is lost")
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        print(f"error: {error}; to need less memory: fewer --micro_batch_tokens, "
              "--activation_checkpointing, more GPUs, or --cpu_offload", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once; --out resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
