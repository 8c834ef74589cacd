"""train.py: deep supervision fine-tuning (DFT) of an English-centric LLM, Hugging Face folder in and out.

    python train.py                                       the demo: 3M parameters, about 2 minutes on 2 cores
    python train.py --model DIR --data zh.jsonl           one GPU
    torchrun --nproc_per_node 8 train.py --model Llama-2-7b-hf --data zh.jsonl --out runs/zh       eight GPUs
    python train.py --model Llama-2-7b-hf --data zh.jsonl --dry_run --world_size 8      what that would take

--data is JSONL or a JSON array with instruction, input, output in your language and their English parallels
in instruction_en, input_en, output_en (or in a second file, --data_en, joined by id or by place). Records
without an English side are trained on as they are. --method names the arms of the paper (arXiv 2503.01275):

    sft           the English side alone: what the language of the base model gives
    tft           the target language alone: ordinary fine-tuning
    dft-logits    and layer i must predict the English query, layer j the English answer: best on generation
    dft-feature   and pooled states at i and j must point where English ones do: best on understanding

OUT/model is a Hugging Face folder, OUT/metrics.jsonl has a line a step, OUT/settings.json says what was run.
A run that died, or got SIGTERM or SIGUSR1, goes on from OUT/checkpoints when the same command is given again.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import (Record, Tokenizer, batch_of, fingerprint, make_records, micro_batches, read_parallel,
                  steps_per_epoch)
from dft import CHUNK, DFT, TERMS, Method, choose_layers, lay_out, size_of
from eval import DTYPES, compare, pick_device, read_questions
from model import (Config, InputError, Tokens, Transformer, fill, fitting, own_rows, read_json, save,
                   write_json)

ARMS = {"sft": ("none", "none"), "tft": ("none", "none"), "dft-logits": ("logits", "logits"),
        "dft-feature": ("feature", "feature")}
SIGNALS = ("none", "logits", "feature")
# Without --model the demo runs, with settings that suit 3M parameters and 2 minutes.
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo")
DEMO = dict(model=os.path.join(HERE, "model"), data=os.path.join(HERE, "train.jsonl"), dtype="fp32",
            test=os.path.join(HERE, "test.jsonl"), batch_size=32, lr=5e-4, epochs=5)
warnings.filterwarnings("ignore", "torch.distributed is disabled")     # checkpoints of one process say that
PLANNING = ("dry_run", "world_size", "gpu_memory", "peak_tflops", "mfu")
# What may differ when a run goes on: places, and how it is computed. (steps and data have keys of their own.)
FREE = ("model", "data", "data_en", "test", "out", "epochs", "device", "ranks", "replicas", "cpu_offload",
        "compile", "micro_batch_tokens", "activation_checkpointing", "max_bad_steps", "save_every", "keep",
        "save_async", "resume")


# ------------------------------------------------------------------------------------------- settings

def settings(argv=None) -> argparse.Namespace:
    """The command line, checked as far as it can be without files."""
    p = argparse.ArgumentParser(
        usage="python train.py [--model DIR --data FILE] [...]", description=__doc__, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 32, 110))

    def add(name, default, help, **more):
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif "choices" not in more:
            more = {"type": str if default is None else type(default), "metavar": "N", **more}
        group.add_argument(name, default=default, **more,
                           help=help + ("" if default is None else f" (default {default})"))

    group = p.add_argument_group("data")
    add("--model", None, "folder of LLaMA-2/3, SmolLM2 or Gemma-2 in safetensors; without it the demo runs, "
        "with settings of its own", metavar="DIR")
    add("--data", None, "records to train on", metavar="FILE")
    add("--data_en", None, "their English side, where --data has the target language alone", metavar="FILE")
    add("--test", None, "questions to answer at the end, before and after, by language", metavar="FILE")
    add("--max_length", 512, "tokens; the ends of longer answers are cut, and counted")
    group = p.add_argument_group("method")
    add("--method", "dft-logits", "arm of the paper, see above", choices=ARMS)
    add("--lc", None, "language conversion at layer i by this, whatever --method says", choices=SIGNALS)
    add("--et", None, "English thinking at layer j by this, whatever --method says", choices=SIGNALS)
    add("--lc_layer", "auto", "i, 1..L; auto: where the lens entropy's first drop ends, or the paper's 2/32")
    add("--et_layer", "auto", "j, i..L; auto: where the second drop begins, or the paper's 15/32")
    add("--lc_weight", 1.0, "of the conversion loss")
    add("--et_weight", 1.0, "of the thinking loss")
    add("--align", "branch", "logits: score the English tokens one by one after the prompt (branch), or read "
        "each off its place in the target text (position)", choices=["branch", "position"])
    add("--pool", "mean", "features: the mean over the tokens, or the last one", choices=["mean", "last"])
    add("--lens_norm", True, "logits: the frozen final norm comes before the head at i and j")
    add("--english_grad", False, "features: the English side learns too")
    group = p.add_argument_group("optimisation")
    add("--epochs", 3, "passes over the data")
    add("--steps", None, "so many steps instead", type=int)
    add("--batch_size", 128, "records a step, over all GPUs")
    add("--lr", 2e-5, "AdamW's peak learning rate")
    add("--warmup", 0.03, "share of the steps that climb to it; a cosine to 0 follows")
    add("--weight_decay", 0.0, "AdamW's")
    add("--clip", 1.0, "largest norm of the gradient")
    add("--max_bad_steps", 10, "in a row, skipped since loss or gradient is not finite, and the run stops")
    add("--seed", 0, "of the order of the records")
    group = p.add_argument_group("run")
    add("--out", None, "folder of the run, a new one or one to go on in; without this, a fresh one in runs/",
        metavar="DIR")
    add("--device", "auto", "auto takes CUDA where there is some", choices=["auto", "cpu", "cuda"])
    add("--dtype", "bf16", "of the computation; master weights and Adam are fp32 anyway", choices=DTYPES)
    add("--compile", "auto", "layers and loss by torch.compile, attention by FlexAttention where there is a "
        "GPU: slow to start, fast then; auto: on a GPU", choices=["auto", "yes", "no"])
    add("--micro_batch_tokens", 4096, "tokens on a GPU at once; less takes less memory for the same result")
    add("--activation_checkpointing", False, "layers are computed again in backward: more time, less memory")
    add("--cpu_offload", False, "weights, gradients and Adam stay in host memory: slower; needs torchrun")
    add("--replicas", 1, "groups of GPUs that each hold the whole model, say one a machine: weights then "
        "travel within a group, and between groups gradients alone")
    group = p.add_argument_group("checkpoints", "in OUT/checkpoints: all that a run needs to go on, bit for "
                                 "bit, as safetensors and JSON")
    add("--save_every", 100, "steps; 0: never, but on SIGTERM and SIGUSR1")
    add("--keep", 2, "of them, the newest; the disk must hold one more, 12 bytes a parameter each")
    add("--save_async", "auto", "write while training goes on, from a copy in host memory; auto: on a GPU",
        choices=["auto", "yes", "no"])
    add("--resume", "auto", "auto: a run that --out holds goes on; never: it is refused",
        choices=["auto", "never"])
    group = p.add_argument_group("planning")
    add("--dry_run", False, "print what the run would take, and stop; needs no weights")
    add("--world_size", 1, "GPUs to plan for")
    add("--gpu_memory", 80.0, "GB of each")
    add("--peak_tflops", 989.0, "of each; 989 is an H100 SXM in dense bf16")
    add("--mfu", 0.4, "share of that peak to count on")

    if p.parse_known_args(argv)[0].model is None:
        p.set_defaults(**DEMO)
    a = p.parse_args(argv)
    a.lc, a.et = (over or arm for over, arm in zip((a.lc, a.et), ARMS[a.method]))
    if a.method == "sft" and (a.lc, a.et) != ("none", "none"):
        raise InputError("--method sft trains on English alone: --lc and --et need another method")
    least = dict(max_length=1, epochs=1, steps=1, batch_size=1, micro_batch_tokens=1, world_size=1,
                 max_bad_steps=1, replicas=1, keep=1)
    for key, value in vars(a).items():
        if isinstance(value, (int, float)) and not least.get(key, 0) <= value < math.inf:
            raise InputError(f"--{key} is {value}, expected at least {least.get(key, 0)}")
    for key in ("lr", "clip", "gpu_memory", "peak_tflops", "mfu"):
        if getattr(a, key) == 0:
            raise InputError(f"--{key} is 0, expected more")
    if a.warmup > 1:
        raise InputError(f"--warmup is {a.warmup}, expected a share of the steps, from 0 to 1")
    if not a.data:
        raise InputError("--model needs --data FILE, the records to train on")
    return a


def make_method(a, config: Config) -> Method:
    """The Method of the settings; a layer that is `auto` is 0 till it is chosen."""
    for key in ("lc_layer", "et_layer"):
        value = getattr(a, key)
        if value != "auto" and not (value.isdecimal() and 1 <= int(value) <= config.num_layers):
            raise InputError(f"--{key} is {value}, expected auto or a layer from 1 to {config.num_layers}, "
                             f"the depth of {a.model}")
    i, j = (0 if layer == "auto" else int(layer) for layer in (a.lc_layer, a.et_layer))
    return check_order(Method(a.lc, a.et, i, j, a.lc_weight, a.et_weight, a.align, a.pool, a.lens_norm,
                              a.english_grad))


def check_order(method: Method) -> Method:
    """Conversion ends before thinking does."""
    if len(method.signals()) == 2 and method.et_layer and method.lc_layer > method.et_layer:
        raise InputError(f"--lc_layer {method.lc_layer} lies above --et_layer {method.et_layer}; a model "
                         "converts to English first and then thinks in it: expected lc_layer <= et_layer")
    return method


def needed_side(a, method: Method) -> str:
    """Which side of the records a run reads, for make_records."""
    return "english" if a.method == "sft" else "both" if method.signals() else "target"


# ------------------------------------------------------------------------------------------- one run

def main(argv=None):
    a = settings(argv)
    config = Config.read(a.model)
    method = make_method(a, config)
    if a.dry_run:
        return print(plan(a, config, method))
    ranks = start(a)
    say = print if ranks.rank == 0 else lambda *_: None

    if a.test:
        read_questions(a.test)                          # a mistake in it should not wait for the end
    rows = read_parallel(a.data, a.data_en)
    records, counts = make_records(rows, Tokenizer(config), needed_side(a, method), a.max_length)
    if method.signals() and not counts.parallel:
        raise InputError(f"{a.data}: no record has instruction_en, input_en and output_en, which --method "
                         f"{a.method} learns from; add them, give --data_en FILE, or take --method tft")
    say(f"data      {a.data}: {counts}")
    per_epoch = steps_per_epoch(len(records), a.batch_size)
    steps = a.steps or a.epochs * per_epoch
    chosen = {**{key: value for key, value in vars(a).items() if key not in PLANNING}, "steps": steps,
              "records": fingerprint(records), "ranks": ranks.world}
    a.out, before = ranks.first(lambda: claim(a, chosen))
    out = os.path.join(a.out, "model")
    if before and os.path.exists(out):
        return say(f"This run is finished: the model is in {out}; for another one give another --out")
    if before:                                          # layers that were chosen then are not chosen anew
        a.lc_layer, a.et_layer = str(before["lc_layer"]), str(before["et_layer"])
        method = make_method(a, config)

    with memory_for("loading weights and AdamW's moments", a):
        model = build(config, method, a, ranks)
        optimizer = make_optimizer(model, a)
    if method.signals() and "auto" in (a.lc_layer, a.et_layer):
        i, j, why = read_layers(model, records)
        method.lc_layer, method.et_layer = method.lc_layer or i, method.et_layer or j
        check_order(method)
        say(f"layers    auto: i = {method.lc_layer}, j = {method.et_layer} of {config.num_layers}, as {why}")
    chosen |= dict(out=a.out, lc_layer=method.lc_layer or "auto", et_layer=method.et_layer or "auto")
    metrics = None                                      # the other ranks write none
    if ranks.rank == 0:
        write_json(chosen, os.path.join(a.out, "settings.json"))        # first: it makes OUT a run
        metrics = open_metrics(a.out)
    say(textwrap.fill("settings  " + "  ".join(f"{key}={value}" for key, value in chosen.items()), 110,
                      subsequent_indent=" " * 10, break_on_hyphens=False, break_long_words=False))
    say(f"run       {steps:,} steps of {a.batch_size} records, {per_epoch:,} an epoch, on {ranks.world} x "
        f"{ranks.device.type}; {sum(p.numel() for p in model.parameters()):,} parameters")
    run = load_checkpoint(a.out, model, optimizer, ranks, say) if before else Progress()
    train(model, optimizer, records, run, metrics, chosen, a, ranks)
    if run.step == steps:
        must_be_finite(dict(model.named_parameters()), a.out, run.step, ranks)
        save(model.model, out, DTYPES[a.dtype])
    if ranks.group:
        dist.destroy_process_group()                    # what is left is rank 0's alone
    if run.step < steps:
        say(f"stopped   by a signal after step {run.step:,} of {steps:,}; the same command with --out "
            f"{a.out} goes on from it")
    elif ranks.rank == 0:
        report(a, run, out, ranks.device)


def train(model: DFT, optimizer, records: list, run: "Progress", metrics, chosen: dict, a, ranks: "Ranks"):
    """The loop, from run.step to the last step, or till a signal ends it."""
    method, steps, config = model.method, chosen["steps"], model.model.config
    per_epoch = steps_per_epoch(len(records), a.batch_size)
    if metrics:                             # steps after the checkpoint are done again, and no line is torn
        for _ in range(run.step):
            metrics.readline()
        metrics.truncate()
    signals, pending = [], None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))

    bar = tqdm(range(run.step, steps), desc=a.method, unit="step", initial=run.step, total=steps,
               disable=ranks.rank > 0, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in bar:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, steps, a.lr, a.warmup)
        batch = [records[n] for n in batch_of(step, len(records), a.batch_size, a.seed)]
        batches = deal(batch, a.micro_batch_tokens, method, config, ranks)
        *counts, tokens = ranks.total([sum(b.counts.get(term, 0) for b in batches) for term in TERMS]
                                      + [sum(b.size() for b in batches)])
        counts = {term: max(count, 1) for term, count in zip(TERMS, counts)}
        sums = torch.zeros(len(TERMS), device=ranks.device)
        for b in batches:
            with memory_for(f"a micro-batch of {len(b.tokens.starts)} records and {b.size():,} tokens", a):
                losses = model(b)
                # A mean over the whole global batch; FSDP averages gradients over the ranks, hence `world`.
                loss = sum(method.weight(term) * value / counts[term] for term, value in losses.items())
                (loss * ranks.world).backward()
            sums += torch.stack([losses[t].detach() if t in losses else sums.new_zeros(()) for t in TERMS])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        *sums, signalled = ranks.total([*sums.tolist(), len(signals)])
        run.step += 1
        fine = math.isfinite(norm + sum(sums))                              # the same on all ranks
        if fine:
            optimizer.step()
            run.updates += 1
        run.bad = 0 if fine else run.bad + 1
        optimizer.zero_grad()

        seconds, sums = time.perf_counter() - began, dict(zip(TERMS, sums))
        mean = {t: sums[t] / counts[t] if fine and (t == "tft" or t in method.signals()) else None
                for t in TERMS}
        loss = sum(method.weight(t) * value for t, value in mean.items() if value is not None)
        line = dict(step=run.step, epoch=round(run.step / per_epoch, 4), loss=loss if fine else None,
                    **mean, lr=lr, grad_norm=norm if fine else None, tokens=int(tokens),
                    tokens_per_s=round(tokens / seconds, 1), seconds=round(seconds, 4),
                    peak_mem_mib=round(peak_memory(ranks.device)), skipped=run.step - run.updates)
        if metrics:
            metrics.write(json.dumps(line).encode() + b"\n")
            metrics.flush()
            shown = " ".join(f"{key}={line[key]:.3f}" for key in ("loss", *TERMS) if line[key] is not None)
            bar.set_postfix_str(f"{shown} tok/s={line['tokens_per_s']:,.0f}", refresh=False)
            if not fine:
                bar.write(f"skipped   step {run.step}: loss or gradient is not finite; {run.bad} in a row, "
                          f"{line['skipped']} in all")
        if run.bad >= a.max_bad_steps:
            raise FloatingPointError(
                f"step {run.step}: loss or gradient was not finite {run.bad} steps in a row; {last(a.out)}; "
                f"try an --lr below {a.lr} or --dtype fp32, with a new --out")
        due = signalled or a.save_every and run.step % a.save_every == 0 and not run.bad
        if pending and (due or pending.done()):
            pending = pending.result()                                  # raises what went wrong in there
        if due:
            if metrics:
                os.fsync(metrics.fileno())                  # no checkpoint is ahead of its lines
            pending = save_checkpoint(a, model, optimizer, run, chosen, ranks)
        if signalled and run.step < steps:
            break
    if pending:
        pending.result()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


@dataclasses.dataclass
class Ranks:
    """This process among the others of a run; `group` is for checkpoints, which may be written meanwhile."""
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
        """What action() returns on rank 0, on every rank; its InputError or OSError is raised on all."""
        answer = [None]
        if self.rank == 0:
            try:
                answer = [action()]
            except (InputError, OSError) as error:
                answer = [InputError(str(error))]
        if self.world > 1:
            dist.broadcast_object_list(answer)
        if isinstance(answer[0], InputError):
            raise answer[0]
        return answer[0]


def start(a) -> Ranks:
    """Where this process stands; under torchrun, with process groups."""
    kind = pick_device(a.device)
    if kind == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large blocks back to the system, which clears every page of them when they are taken
        # again: a fifth of a step. So: no blocks by mmap (M_MMAP_MAX), nothing given back (M_TRIM_THRESHOLD).
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    torch.manual_seed(a.seed + int(os.environ.get("RANK", 0)))
    if "RANK" not in os.environ:
        if a.replicas > 1 or a.cpu_offload:
            raise InputError("--replicas and --cpu_offload need torchrun (for --cpu_offload on one GPU: "
                             "torchrun --nproc_per_node 1 train.py ...)")
        return Ranks(torch.device(kind))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if not a.out:
            raise InputError("torchrun --max-restarts needs --out DIR, where a restart finds the run")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":    # pytorch/pytorch issue 135712
            raise InputError("restarted ranks would look for dead ones; give torchrun --standalone (or "
                             "--rdzv_backend c10d) and the variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    if dist.get_world_size() % a.replicas:
        raise InputError(f"--replicas {a.replicas} does not divide the {dist.get_world_size()} ranks")
    return Ranks(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def build(config: Config, method: Method, a, ranks: Ranks) -> DFT:
    """The model with its weights, in fp32, sharded over the ranks under torchrun.

    FSDP2: each layer is a group of its own; embedding, final norm and head are one, the root's, so that a
    tied head stays tied. Weights are gathered in the compute dtype, gradients summed in fp32. With replicas
    the ranks are a (replicas, shards) mesh. No rank reads or holds more than its rows.
    """
    with torch.device("meta"):
        model = DFT(Transformer(config), method)
    fitting(model.model, a.model)               # a folder that does not fit is told before memory is taken
    model.model.compute_dtype = DTYPES[a.dtype]
    for layer in model.model.layers:
        layer.checkpointing = a.activation_checkpointing
    if a.compile == "yes" or a.compile == "auto" and ranks.device.type == "cuda":
        model.compile_parts(flex=ranks.device.type == "cuda")
    if ranks.group:
        mesh = init_device_mesh(ranks.device.type, (a.replicas, ranks.world // a.replicas),
                                mesh_dim_names=("replica", "shard"))
        mesh = mesh if a.replicas > 1 else mesh["shard"]
        dtypes = MixedPrecisionPolicy(DTYPES[a.dtype], torch.float32, cast_forward_inputs=False)
        place = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if a.cpu_offload else OffloadPolicy()
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=dtypes, offload_policy=place)
    model.to_empty(device="cpu" if a.cpu_offload else ranks.device)
    fill(model.model, a.model)
    return model


def read_layers(model: DFT, records: list):
    """choose_layers() on the mean entropy over 16 target-language queries, without their template."""
    picked = [r for r in records if r.query_en is not None][:16]
    tokens = Tokens.plain([r.prompt for r in picked], model.model.config.num_layers)
    places = [tokens.starts[n][0] + t for n, r in enumerate(picked) for t in range(*r.query)] or [0]
    entropy, _ = model((tokens, torch.tensor(places), torch.empty(len(places), 0, dtype=torch.long)))
    return choose_layers(entropy.mean(1).tolist())


def make_optimizer(model: DFT, a) -> torch.optim.AdamW:
    """AdamW with its moments, so that a checkpoint can be loaded into them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    for p in model.parameters():
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                  exp_avg_sq=torch.zeros_like(p))
    return optimizer


def deal(batch: list, budget: int, method: Method, config: Config, ranks: Ranks) -> list:
    """This rank's micro-batches of a global batch; all ranks have equally many, as FSDP requires."""
    sizes = [size_of(record, method) for record in batch]
    mine = micro_batches(sizes, budget, ranks.world)[ranks.rank::ranks.world]
    nothing = Record([config.bos_id], [])     # a rank without a record runs one token that nothing supervises
    return [lay_out([batch[n] for n in picked] or [nothing], method, config.num_layers) for picked in mine]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of a step (from 0): (1) warm-up climbs in equal parts to the peak, (2) half a cosine falls to 0."""
    climb = math.ceil(warmup * steps)
    if step < climb:
        return peak * (step + 1) / climb
    return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1, steps - climb)))


def claim(a, chosen: dict):
    """(the folder of the run, None), or (the folder, the settings of the run in it, which goes on).
    InputError if it holds something else, or a run whose result other settings would change."""
    name = f"{a.method}-{os.path.basename(os.path.normpath(a.model))}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = a.out or os.path.join("runs", name)
    while a.out is None and os.path.exists(out):
        out += "-again"
    try:
        os.makedirs(out, exist_ok=True)
        there = [name for name in sorted(os.listdir(out)) if not name.endswith(".tmp")]     # see write_json
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; expected a folder that can be made") from None
    if not there:
        return out, None
    if a.resume == "never" or "settings.json" not in there:
        raise InputError(f"--out {out} holds {', '.join(there[:3])}, perhaps another run; give a new folder, "
                         "or leave --out away for a fresh one under runs/")
    path = os.path.join(out, "settings.json")
    before = read_json(path)
    if not isinstance(before, dict) or "lc_layer" not in before or "et_layer" not in before:
        raise InputError(f"{path}: not the settings of a run; give another --out")
    for key, value in chosen.items():
        old = before.get(key)
        if key not in FREE and str(value) != str(old) and value != "auto":
            what = {"steps": "the number of steps", "records": "the digest of the tokenized data"}
            raise InputError(f"{what.get(key, '--' + key)} is {value}, but {path} has {old}, and the result "
                             "would be another; give that again to go on, or a new --out")
    return out, before


def open_metrics(out: str):
    """metrics.jsonl at its beginning, locked: two processes would spoil each other's run."""
    metrics = open(os.path.join(out, "metrics.jsonl"), "a+b")
    try:
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)             # till this process ends
    except BlockingIOError:
        raise OSError(f"{out}: another process trains in it; end that one, or give a new --out") from None
    metrics.seek(0)
    return metrics


@contextlib.contextmanager
def memory_for(what: str, a):
    """Where memory runs out, an error that says in what and which settings lower it."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        raise MemoryError(f"out of memory in {what}; less is needed with --micro_batch_tokens below "
                          f"{a.micro_batch_tokens}, --activation_checkpointing, more GPUs, or --cpu_offload; "
                          f"{last(a.out or '')}") from None


def peak_memory(device) -> float:
    """MiB at most, so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10        # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def report(a, run: "Progress", out: str, device) -> None:
    """The table before and after, and where the result lies."""
    if run.updates < run.step:
        print(f"\n{run.step - run.updates} of {run.step} steps were skipped: loss or gradient was not finite")
    if a.test:
        print(f"\nAnswers to {a.test} that are right to the letter:\n")
        print(compare({"before": a.model, "after": out}, a.test, device, DTYPES[a.dtype]))
    ask = f"--data {a.test}" if a.test else "--prompt 'a question'"
    print(f"\nThe model is in {out}; next: python eval.py --model {out} {ask}")


# ------------------------------------------------------------------------------------------- checkpoints

@dataclasses.dataclass
class Progress:
    """How far a run is: with weights, moments and generators, all that the rest of it depends on."""
    step: int = 0               # steps done: where batch_of() and learning_rate() go on
    updates: int = 0            # those that changed the weights, AdamW's own count
    bad: int = 0                # steps skipped in a row, up to now


def save_checkpoint(a, model: DFT, optimizer, run: Progress, chosen: dict, ranks: Ranks):
    """Write OUT/checkpoints/step-NNNNNN; all ranks call it. With --save_async it returns a future.

    torch.distributed.checkpoint writes safetensors, each rank its shards, a file a layer. The folder has
    another name till all is on the disk; state.json, with everyone's digests, is last. OSError says what went
    wrong: the checkpoints before are untouched then, for the oldest goes when the newest is whole.
    """
    folder = os.path.join(a.out, "checkpoints", f"step-{run.step:06d}")
    part, began, tensors = folder + ".partial", time.perf_counter(), live_tensors(model, optimizer, ranks)
    state = dict(progress=dataclasses.asdict(run), ranks=ranks.world, settings=chosen)
    layers = {name: 2 + int(name.split(".")[2]) if ".layers." in name else 1 for name in tensors}
    layers |= {f"rng.{kind}.{rank}": 1 for kind, _ in generators(ranks) for rank in range(ranks.world)}
    where = dict(storage_writer=dcp.HuggingFaceStorageWriter(part, layers, save_distributed=True),
                 process_group=ranks.group, no_dist=not ranks.group)
    must_be_finite(tensors, a.out, run.step, ranks)

    def seal(written):
        try:
            written()
            mine = [f for f in sorted(os.listdir(part)) if f.startswith(f"shard-{ranks.rank + 1:05d}-")]
            files = [{f: digest(os.path.join(part, f)) for f in mine}]
            if ranks.group:
                files = files * ranks.world
                dist.all_gather_object(files, files[0], group=ranks.group)     # which waits for all, too
            if ranks.rank == 0:
                state["files"] = {f: d for theirs in files for f, d in theirs.items()}
                write_json(dict(**state, digest=digest(state)), os.path.join(part, "state.json"))
                os.rename(part, folder)
                for old in checkpoints(a.out)[:-a.keep]:
                    os.rename(old, old + ".partial")
                for old in checkpoints(a.out, ".partial"):
                    shutil.rmtree(old)
                tqdm.write(f"saved     {folder} in {time.perf_counter() - began:.1f} s")
        except (OSError, CheckpointException) as error:
            raise OSError(f"{part}: {cause(error)}; step {run.step} is not saved; {last(a.out)}; mend this, "
                          f"and the same command with --out {a.out} goes on from there") from None

    # An OUT that vanished is not made anew, and what an earlier crash left does not count among the files.
    ranks.first(lambda: os.stat(a.out) and shutil.rmtree(part, ignore_errors=True))
    if a.save_async == "no" or a.save_async == "auto" and ranks.device.type == "cpu":
        return seal(lambda: dcp.save(tensors, **where))
    return ThreadPoolExecutor(1).submit(seal, dcp.async_save(tensors, **where).result)


def load_checkpoint(out: str, model: DFT, optimizer, ranks: Ranks, say) -> Progress:
    """Fill model, optimizer and generators from the newest checkpoint that is whole, saved on however many
    ranks. Nothing in it is unpickled. What is passed over is said; InputError if that is all there is."""
    folders, unfinished = ranks.first(lambda: (checkpoints(out), checkpoints(out, ".partial")))
    damaged = []
    for folder in unfinished:
        say(f"resume    passes over {folder}: the run died while it was written")
    for folder in reversed(folders):
        tensors, why = live_tensors(model, optimizer, ranks), ""
        try:
            run, world = read_state(folder, ranks)
        except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            why = str(error)
        if not ranks.total([bool(why)])[0]:
            if world != ranks.world:                    # the generators of other ranks mean nothing here
                tensors = {name: t for name, t in tensors.items() if not name.startswith("rng.")}
            try:
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder),
                         process_group=ranks.group, no_dist=not ranks.group)
            except CheckpointException as error:
                why = cause(error)
            else:
                for p in model.parameters():
                    optimizer.state[p]["step"].fill_(run.updates)
                for kind, generator in generators(ranks):
                    if f"rng.{kind}.{ranks.rank}" in tensors:
                        generator.set_rng_state(tensors[f"rng.{kind}.{ranks.rank}"])
                ranks.first(lambda: [os.rename(bad, f"{bad}.damaged-{time.time():.0f}") for bad in damaged])
                say(f"resume    from {folder}, after step {run.step:,}")
                return run
        damaged.append(folder)
        say(f"resume    passes over {folder}: {InputError(why or 'a file of it is damaged')}")
    if folders:
        raise InputError(f"{out}: no checkpoint in it is whole; remove {out}/checkpoints to begin anew")
    say(f"resume    from the first step: {out} has no checkpoint")
    return Progress()


def read_state(folder: str, ranks: Ranks):
    """The Progress of a checkpoint and the number of its ranks, from state.json, when this rank's share of
    the files has the digests that stand in there; else one of many exceptions."""
    state = read_json(os.path.join(folder, "state.json"))
    if state.pop("digest") != digest(state):
        raise ValueError("state.json is damaged")
    run, files = Progress(**state["progress"]), sorted(set(os.listdir(folder)) - {"state.json"})
    sane = all(type(n) is int and 0 <= n < 1e9 for n in vars(run).values())
    if files != sorted(state["files"]) or not sane:
        raise ValueError("state.json tells of other files, or of no number of steps")
    for file in files[ranks.rank::ranks.world]:
        if digest(os.path.join(folder, file)) != state["files"][file]:
            raise ValueError(f"{file} is damaged")
    return run, state["ranks"]


def live_tensors(model: DFT, optimizer, ranks: Ranks) -> dict:
    """{name: tensor} of what a checkpoint holds: weights, AdamW's moments, this rank's random generators."""
    tensors = {f"rng.{kind}.{ranks.rank}": generator.get_rng_state() for kind, generator in generators(ranks)}
    for name, p in model.named_parameters():
        tensors[name] = p.detach()
        tensors |= {f"{name}.{key}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def generators(ranks: Ranks) -> list:
    """torch's random generators. A step draws nothing from them; they are kept for whoever adds dropout."""
    return [("cpu", torch), ("cuda", torch.cuda)][:1 + (ranks.device.type == "cuda")]


def checkpoints(out: str, ending: str = "") -> list:
    """The finished checkpoints of a run, oldest first; or those that are being written or removed."""
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted((n for n in names if re.fullmatch(r"step-\d{6,}" + ending, n)), key=lambda n: (len(n), n))
    return [os.path.join(folder, n) for n in names]


def digest(of) -> str:
    """SHA-256 of a file, by its name, or of a JSON value."""
    if isinstance(of, str):
        with open(of, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def must_be_finite(tensors: dict, out: str, step: int, ranks: Ranks) -> None:
    """FloatingPointError on all ranks if a tensor holds a NaN or an infinity: that is never saved."""
    bad = [name for name, t in tensors.items() if not own_rows(t)[0].isfinite().all()]
    if ranks.total([len(bad)])[0]:
        raise FloatingPointError(f"after step {step} weights or moments are not finite"
                                 f"{', ' + bad[0] if bad else ''}; they are not saved; {last(out)}")


def last(out: str) -> str:
    """The newest checkpoint, in words."""
    return f"the last checkpoint is {(checkpoints(out) or ['none'])[-1]}"


def cause(error) -> str:
    """What is behind an error of torch.distributed.checkpoint."""
    return str(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)


# ------------------------------------------------------------------------------------------- planning

def plan(a, config: Config, method: Method) -> str:
    """What a run would take, from config.json and the data; every estimate bears its formula."""
    with torch.device("meta"):
        model = Transformer(config)
    n, layer = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
    W, L, D, M, V = (a.world_size, config.num_layers, config.hidden_size, config.intermediate_size,
                     config.vocab_size)
    if W % a.replicas:
        raise InputError(f"--replicas {a.replicas} does not divide --world_size {W}")
    H, K = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    i, j = method.lc_layer or max(1, round(L * 2 / 32)), method.et_layer or max(1, round(L * 15 / 32))

    rows = read_parallel(a.data, a.data_en)
    if any(os.path.exists(os.path.join(a.model, f)) for f in ("tokenizer.model", "tokenizer.json")):
        records, said = make_records(rows, Tokenizer(config), needed_side(a, method), a.max_length)
        count = len(records)
        P, A, X, Y, E = (sum(len(getattr(r, key) or []) for r in records) / count
                         for key in ("prompt", "answer", "query_en", "answer_en", "prompt_en"))
    else:
        count, P, A = len(rows), a.max_length / 2, a.max_length / 2
        X, Y, E = (P, A, P) if method.signals() else (0, 0, 0)
        said = f"{count:,} records; no tokenizer in {a.model}, so taken as {a.max_length} tokens each"
    steps = a.steps or a.epochs * steps_per_epoch(count, a.batch_size)

    # A weight costs a token 2 FLOPs forward and 4 backward in each layer that the token passes through.
    x, y = X * method.branches("lc"), Y * method.branches("et")
    row, deep = P + A + x + y, (P + A) * L + x * i + y * j            # tokens, and layer-tokens, of a record
    english = (E + Y) * L if method.et == "feature" else E * i if method.lc == "feature" else 0
    once = 2 * layer + 4 * H * (P + A) / 2                                  # half of QK and AV is masked
    flops = (3 + a.activation_checkpointing) * deep * once + (3 if a.english_grad else 1) * english * once
    flops += 2 * V * D * (3 * A + 2 * (x + y))                              # a frozen head has no gradient
    flops *= steps * min(a.batch_size, count)
    minutes = flops / (W * a.peak_tflops * 1e12 * a.mfu) / 60

    low, root = DTYPES[a.dtype].itemsize, n - L * layer
    passing = min(a.micro_batch_tokens, row * a.batch_size / W) * deep / (L * row)
    kept = 8 * D + low * (2 * D + 3 * H + 2 * K + 4 * M)                    # bytes a token leaves in a layer
    copies = W > 1 or low < 4                                               # beside the fp32 masters
    where, share = f"1/{W // a.replicas}", a.replicas / W
    if a.cpu_offload:
        where, share = "in host memory", 0
    memory = {
        f"master weights, fp32, {where}": 4 * n * share,
        f"their gradients, fp32, {where}": 4 * n * share,
        f"Adam's two moments, fp32, {where}": 8 * n * share,
        f"gathered weights, {a.dtype}: embedding, head, 2 layers": copies * low * (root + 2 * layer),
        f"gradients before their sum, {a.dtype}: embedding, head, 1 layer": copies * low * (root + layer),
        f"activations of {a.micro_batch_tokens:,} tokens": passing * (
            L * low * D + kept if a.activation_checkpointing else L * kept),
        "logits of a chunk": (4 + 4 + low) * CHUNK,
    }
    need = sum(memory.values()) / 1e9
    return "\n".join([
        f"model     {a.model}: {config.model_type}, {n:,} parameters, {L} layers of {layer:,}, V = {V:,}",
        f"data      {said}",
        f"tokens    a record, on average: prompt {P:.0f}, answer {A:.0f}, English query {X:.0f}, English "
        f"answer {Y:.0f}" + (f"; i = {i}, j = {j}" if method.signals() else ""),
        f"steps     {steps:,} of {a.batch_size} records; {flops / steps:.2e} FLOPs each, {flops:.2e} in all",
        f"time      {minutes:,.1f} min on {W} GPUs of {a.peak_tflops:g} TFLOP/s at {a.mfu:.0%} MFU (--mfu)",
        f"disk      {12 * n * (a.keep + 1) / 1e9:,.1f} GB checkpoints, {low * n / 1e9:,.1f} GB for a model",
        "memory    of each GPU, in GB of 1e9 bytes (estimated):",
        *(f"          {size / 1e9:8.2f}  {what}" for what, size in memory.items()),
        f"          {need:8.2f}  together, of {a.gpu_memory:g}: " + (
            "fits" if need < 0.92 * a.gpu_memory else "does NOT fit with 8 % for the allocator; more GPUs, "
            "--activation_checkpointing, fewer --micro_batch_tokens or --cpu_offload lower it")])


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)                         # a log is read while it is written
    try:
        main()
    except (InputError, FloatingPointError, OSError, MemoryError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (OSError, MemoryError)):   # not everyone's
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        sys.exit("stopped by hand; the same command with --out goes on from its last checkpoint, if any")
