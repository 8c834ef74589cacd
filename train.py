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
"""
import argparse
import datetime
import json
import math
import os
import resource
import sys
import textwrap
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import Record, Tokenizer, batch_of, make_records, micro_batches, read_parallel, steps_per_epoch
from dft import CHUNK, DFT, TERMS, Method, choose_layers, lay_out, size_of
from eval import DTYPES, compare, pick_device, read_questions
from model import Config, InputError, Tokens, Transformer, fill, fitting, save, write_json

ARMS = {"sft": ("none", "none"), "tft": ("none", "none"), "dft-logits": ("logits", "logits"),
        "dft-feature": ("feature", "feature")}
SIGNALS = ("none", "logits", "feature")
# Without --model the demo runs, with settings that suit 3M parameters and 2 minutes.
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo")
DEMO = dict(model=os.path.join(HERE, "model"), data=os.path.join(HERE, "train.jsonl"), dtype="fp32",
            test=os.path.join(HERE, "test.jsonl"), batch_size=32, lr=5e-4, epochs=5)
PLANNING = ("dry_run", "world_size", "gpu_memory", "peak_tflops", "mfu")


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
    add("--seed", 0, "of the order of the records")
    group = p.add_argument_group("run")
    add("--out", None, "folder without a run in it; without this, a fresh one under runs/", metavar="DIR")
    add("--device", "auto", "auto takes CUDA where there is some", choices=["auto", "cpu", "cuda"])
    add("--dtype", "bf16", "of the computation; master weights and Adam are fp32 anyway", choices=DTYPES)
    add("--micro_batch_tokens", 4096, "tokens on a GPU at once; less takes less memory for the same result")
    add("--activation_checkpointing", False, "layers are computed again in backward: more time, less memory")
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
    least = dict(max_length=1, epochs=1, steps=1, batch_size=1, micro_batch_tokens=1, world_size=1, warmup=0,
                 weight_decay=0, lc_weight=0, et_weight=0, seed=0)
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
    device, rank, world = start(a)
    say = print if rank == 0 else lambda *_: None

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

    model = build(config, method, a, device)
    if method.signals() and "auto" in (a.lc_layer, a.et_layer):
        i, j, why = read_layers(model, records)
        method.lc_layer, method.et_layer = method.lc_layer or i, method.et_layer or j
        check_order(method)
        say(f"layers    auto: i = {method.lc_layer}, j = {method.et_layer} of {config.num_layers}, as {why}")
    a.lc_layer, a.et_layer = method.lc_layer, method.et_layer
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)

    chosen = {key: value for key, value in vars(a).items() if key not in PLANNING}
    if rank == 0:                                       # the other ranks write nothing
        chosen["out"] = a.out = claim(a)
        write_json({**chosen, "ranks": world, "steps": steps}, os.path.join(a.out, "settings.json"))
        metrics = open(os.path.join(a.out, "metrics.jsonl"), "w", encoding="utf-8")
    say(textwrap.fill("settings  " + "  ".join(f"{key}={value}" for key, value in chosen.items()), 110,
                      subsequent_indent=" " * 10, break_on_hyphens=False, break_long_words=False))
    say(f"run       {steps:,} steps of {a.batch_size} records, {per_epoch:,} an epoch, on {world} x "
        f"{device.type}; {sum(p.numel() for p in model.parameters()):,} parameters")

    bar = tqdm(range(steps), desc=a.method, unit="step", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in bar:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, steps, a.lr, a.warmup)
        batch = [records[n] for n in batch_of(step, len(records), a.batch_size, a.seed)]
        batches = deal(batch, a.micro_batch_tokens, method, config, rank, world)
        *counts, tokens = total([sum(b.counts.get(term, 0) for b in batches) for term in TERMS]
                                + [sum(b.size() for b in batches)], device, world)
        counts = {term: max(count, 1) for term, count in zip(TERMS, counts)}
        sums = torch.zeros(len(TERMS), device=device)
        for b in batches:
            losses = model(b)
            # A mean over the whole global batch; FSDP averages gradients over the ranks, hence `world`.
            loss = sum(method.weight(term) * value / counts[term] for term, value in losses.items())
            (loss * world).backward()
            sums += torch.stack([losses[t].detach() if t in losses else sums.new_zeros(()) for t in TERMS])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        sums = dict(zip(TERMS, total(sums.tolist(), device, world)))
        if not math.isfinite(norm + sum(sums.values())):
            raise FloatingPointError(f"step {step + 1}: the loss or its gradient is not finite; no model was "
                                     f"saved; try an --lr below {a.lr}, or --dtype fp32")
        optimizer.step()
        optimizer.zero_grad()

        mean = {t: sums[t] / counts[t] if t == "tft" or t in method.signals() else None for t in TERMS}
        seconds = time.perf_counter() - began
        line = dict(step=step + 1, epoch=round((step + 1) / per_epoch, 4),
                    loss=sum(method.weight(t) * value for t, value in mean.items() if value is not None),
                    **mean, lr=lr, grad_norm=norm, tokens=int(tokens),
                    tokens_per_s=round(tokens / seconds, 1), seconds=round(seconds, 4),
                    peak_mem_mib=round(peak_memory(device)))
        if rank == 0:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            shown = " ".join(f"{key}={line[key]:.3f}" for key in ("loss", *TERMS) if line[key] is not None)
            bar.set_postfix_str(f"{shown} tok/s={line['tokens_per_s']:,.0f}", refresh=False)

    out = os.path.join(a.out or "", "model")
    save(model.model, out, DTYPES[a.dtype])
    if dist.is_initialized():
        dist.destroy_process_group()                    # what is left is rank 0's alone
    if rank == 0:
        report(a, out, device)


def start(a):
    """(device, rank, world size); under torchrun, with a process group."""
    kind = pick_device(a.device)
    if "RANK" not in os.environ:
        return torch.device(kind), 0, 1
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def build(config: Config, method: Method, a, device) -> DFT:
    """The model with its weights, in fp32, sharded over the ranks under torchrun.

    FSDP2: each layer is a group of its own; embedding, final norm and head are one, the root's, so that a
    tied head stays tied. Weights are gathered in the compute dtype, gradients summed in fp32.
    """
    with torch.device("meta"):
        model = DFT(Transformer(config), method)
    fitting(model.model, a.model)               # a folder that does not fit is told before memory is taken
    model.model.compute_dtype = DTYPES[a.dtype]
    for layer in model.model.layers:
        layer.checkpointing = a.activation_checkpointing
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        dtypes = MixedPrecisionPolicy(DTYPES[a.dtype], torch.float32, cast_forward_inputs=False)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=dtypes)
    model.to_empty(device=device)
    fill(model.model, a.model)
    return model


def read_layers(model: DFT, records: list):
    """choose_layers() on the mean entropy over 16 target-language queries, without their template."""
    picked = [r for r in records if r.query_en is not None][:16]
    tokens = Tokens.plain([r.prompt for r in picked], model.model.config.num_layers)
    places = [tokens.starts[n][0] + t for n, r in enumerate(picked) for t in range(*r.query)] or [0]
    return choose_layers(model((tokens, torch.tensor(places))).mean(1).tolist())


def deal(batch: list, budget: int, method: Method, config: Config, rank: int, world: int) -> list:
    """This rank's micro-batches of a global batch; all ranks have equally many, as FSDP requires."""
    mine = micro_batches([size_of(record, method) for record in batch], budget, world)[rank::world]
    nothing = Record([config.bos_id], [])     # a rank without a record runs one token that nothing supervises
    return [lay_out([batch[n] for n in picked] or [nothing], method, config.num_layers) for picked in mine]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of a step (from 0): (1) warm-up climbs in equal parts to the peak, (2) half a cosine falls to 0."""
    climb = math.ceil(warmup * steps)
    if step < climb:
        return peak * (step + 1) / climb
    return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1, steps - climb)))


def total(values: list, device, world: int) -> list:
    """Each number summed over the ranks."""
    if world == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def claim(a) -> str:
    """Make the folder of the run; InputError if there is something in it."""
    name = f"{a.method}-{os.path.basename(os.path.normpath(a.model))}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = a.out or os.path.join("runs", name)
    while a.out is None and os.path.exists(out):
        out += "-again"
    try:
        os.makedirs(out, exist_ok=True)
        there = ", ".join(sorted(os.listdir(out))[:3])
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; expected a folder that can be made") from None
    if there:
        raise InputError(f"--out {out} holds {there}, perhaps another run; give a new folder, or leave --out "
                         "away for a fresh one under runs/")
    return out


def peak_memory(device) -> float:
    """MiB at most, so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10        # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def report(a, out: str, device) -> None:
    """The table before and after, and where the result lies."""
    if a.test:
        print(f"\nAnswers to {a.test} that are right to the letter:\n")
        print(compare({"before": a.model, "after": out}, a.test, device, DTYPES[a.dtype]))
    ask = f"--data {a.test}" if a.test else "--prompt 'a question'"
    print(f"\nThe model is in {out}; next: python eval.py --model {out} {ask}")


# ------------------------------------------------------------------------------------------- planning

def plan(a, config: Config, method: Method) -> str:
    """What a run would take, from config.json and the data; every estimate bears its formula."""
    with torch.device("meta"):
        model = Transformer(config)
    n, layer = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
    W, L, D, M, V = (a.world_size, config.num_layers, config.hidden_size, config.intermediate_size,
                     config.vocab_size)
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
    memory = {
        "master weights, fp32, a share": 4 * n / W,
        "their gradients, fp32, a share": 4 * n / W,
        "Adam's two moments, fp32, a share": 8 * n / W,
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
        f"memory    of each GPU, in GB of 1e9 bytes (estimated; a share is 1/{W}):",
        *(f"          {size / 1e9:8.2f}  {what}" for what, size in memory.items()),
        f"          {need:8.2f}  together, of {a.gpu_memory:g}: " + (
            "fits" if need < 0.92 * a.gpu_memory else "does NOT fit with 8 % for the allocator; more GPUs, "
            "--activation_checkpointing or fewer --micro_batch_tokens lower it")])


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
