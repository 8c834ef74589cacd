"""train.py: deep supervision fine-tuning (DFT) of an English-centric LLM, from a Hugging Face folder to another one.

    python train.py                                                  the demo: 3M parameters, about 2 minutes on 2 cores
    python train.py --model DIR --data zh.jsonl                      one GPU
    torchrun --nproc_per_node 8 train.py --model Llama-2-7b-hf --data zh.jsonl --out runs/zh               the real thing
    python train.py --model Llama-2-7b-hf --data zh.jsonl --dry_run --world_size 8         what it would take: no weights

--data is JSONL or a JSON array with instruction, input, output in your language and their English parallels in
instruction_en, input_en, output_en (or a second file, --data_en, joined by id or by place). Records without an English
side are trained on as they are. The four arms of the paper (arXiv 2503.01275):

    --method sft           the English side only: what the base model's own language gives
    --method tft           the target language only: ordinary fine-tuning
    --method dft-logits    and layer i must predict the English query, layer j the English answer (best on generation)
    --method dft-feature   and pooled states at i and j must point where English ones do (best on understanding)

OUT/model is a Hugging Face folder; OUT/metrics.jsonl has a line a step; OUT/settings.json says what was run.
"""
import argparse
import datetime
import json
import math
import os
import resource
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import (Record, Tokenizer, batch_of, make_records, micro_batches, read_parallel, steps_per_epoch)
from dft import CHUNK, DFT, TERMS, Method, choose_layers, lay_out
from eval import DTYPES, compare, pick_device
from model import Config, InputError, Tokens, Transformer, fill, save, write_json

HERE = os.path.dirname(os.path.abspath(__file__))
ARMS = {"sft": ("none", "none"), "tft": ("none", "none"), "dft-logits": ("logits", "logits"),
        "dft-feature": ("feature", "feature")}
# Without --model the demo runs, with settings that suit 3M parameters and 2 minutes.
DEMO = dict(model=os.path.join(HERE, "demo", "model"), data=os.path.join(HERE, "demo", "train.jsonl"),
            test=os.path.join(HERE, "demo", "test.jsonl"), batch_size=32, lr=1e-3, epochs=3, dtype="fp32",
            max_length=256)


# ---------------------------------------------------------------------------------------------- settings

def settings(argv=None) -> argparse.Namespace:
    """The command line, checked as far as it can be without files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = partial(argparse.BooleanOptionalAction)
    g = p.add_argument_group("data")
    g.add_argument("--model", metavar="DIR", help="Hugging Face folder of LLaMA-2/3, SmolLM2 or Gemma-2, safetensors "
                   "(default: the demo, with settings of its own)")
    g.add_argument("--data", metavar="FILE", help="parallel records, JSONL or JSON array")
    g.add_argument("--data_en", metavar="FILE", help="the English side, where --data has the target language only")
    g.add_argument("--test", metavar="FILE", help="questions to answer at the end, before and after, by language")
    g.add_argument("--max_length", type=int, default=512, metavar="N", help="tokens; longer answers are cut and "
                   "counted (default 512)")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=ARMS, default="dft-logits", help="the paper's arms, see above (default dft-logits)")
    g.add_argument("--lc", choices=["none", "logits", "feature"], help="language conversion at layer i, over --method's")
    g.add_argument("--et", choices=["none", "logits", "feature"], help="English thinking at layer j, over --method's")
    g.add_argument("--lc_layer", default="auto", metavar="I", help="1..L; auto: where the entropy's first drop ends; "
                   "the paper's 2 of 32 if there are no two drops (default auto)")
    g.add_argument("--et_layer", default="auto", metavar="J", help="I..L; auto: where its second drop begins; the "
                   "paper's 15 of 32 (default auto)")
    g.add_argument("--lc_weight", type=float, default=1.0, metavar="W", help="default 1, as in the paper")
    g.add_argument("--et_weight", type=float, default=1.0, metavar="W", help="default 1, as in the paper")
    g.add_argument("--align", choices=["branch", "position"], default="branch", help="logits: English tokens follow the "
                   "prompt and are scored one by one (branch, the formula), or are read off the target text's places")
    g.add_argument("--pool", choices=["mean", "last"], default="mean", help="features: mean over tokens, or the last one")
    g.add_argument("--lens_norm", action=flag, default=True, help="the frozen final norm before the head at i and j")
    g.add_argument("--english_grad", action=flag, default=False, help="features: let the English side learn too")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=3, metavar="N", help="default 3")
    g.add_argument("--steps", type=int, metavar="N", help="so many steps instead of --epochs")
    g.add_argument("--batch_size", type=int, default=128, metavar="N", help="records a step, over all GPUs (default 128)")
    g.add_argument("--lr", type=float, default=2e-5, help="peak of AdamW's learning rate (default 2e-5)")
    g.add_argument("--warmup", type=float, default=0.03, metavar="SHARE", help="of the steps, linear; then cosine to 0 "
                   "(default 0.03)")
    g.add_argument("--weight_decay", type=float, default=0.0, metavar="W", help="default 0")
    g.add_argument("--clip", type=float, default=1.0, metavar="NORM", help="largest gradient norm (default 1)")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the records (default 0)")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", help="a folder that holds no run yet (default: a fresh one under runs/)")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the computation; master weights, gradients' sums "
                   "and Adam are fp32 anyway (default bf16; fp32 for exactness)")
    g.add_argument("--micro_batch_tokens", type=int, default=4096, metavar="N", help="tokens a GPU takes at once; lower "
                   "it when memory runs out: the result is the same (default 4096)")
    g.add_argument("--activation_checkpointing", action=flag, default=False, help="keep one tensor a layer and compute "
                   "the rest again: about a third more time, a fraction of the memory")
    g = p.add_argument_group("planning")
    g.add_argument("--dry_run", action="store_true", help="print what the run would take, and stop; needs no weights")
    g.add_argument("--world_size", type=int, default=1, metavar="N", help="GPUs to plan for (default 1)")
    g.add_argument("--gpu_memory", type=float, default=80, metavar="GB", help="of each (default 80)")
    g.add_argument("--peak_tflops", type=float, default=989, help="of each, dense bf16 (default 989, H100 SXM)")
    g.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default 0.4)")
    if p.parse_known_args(argv)[0].model is None:
        p.set_defaults(**DEMO)
    a = p.parse_args(argv)
    a.lc, a.et = (over or arm for over, arm in zip((a.lc, a.et), ARMS[a.method]))
    if a.method == "sft" and (a.lc, a.et) != ("none", "none"):
        raise InputError("--method sft trains on English alone: --lc and --et need another method")
    for key in ("max_length", "epochs", "steps", "batch_size", "micro_batch_tokens", "world_size"):
        if getattr(a, key) is not None and getattr(a, key) < 1:
            raise InputError(f"--{key} is {getattr(a, key)}, expected at least 1")
    for key in ("lr", "clip", "gpu_memory", "peak_tflops", "mfu"):
        if not 0 < getattr(a, key) < math.inf:
            raise InputError(f"--{key} is {getattr(a, key)}, expected a number above 0")
    for key in ("warmup", "weight_decay", "lc_weight", "et_weight"):
        if not 0 <= getattr(a, key) < math.inf:
            raise InputError(f"--{key} is {getattr(a, key)}, expected 0 or more")
    if not a.data:
        raise InputError("--model needs --data FILE, the parallel records to train on")
    return a


def make_method(a, config: Config) -> Method:
    """The Method of the settings; layers that are `auto` are 0 and chosen later. InputError for impossible layers."""
    L, layers = config.num_layers, {}
    for key in ("lc_layer", "et_layer"):
        value = getattr(a, key)
        if value != "auto" and not (value.isascii() and value.isdigit() and 1 <= int(value) <= L):
            raise InputError(f"--{key} is {value}, expected auto or a layer from 1 to {L}, the depth of {a.model}")
        layers[key] = 0 if value == "auto" else int(value)
    method = Method(a.lc, a.et, **layers, lc_weight=a.lc_weight, et_weight=a.et_weight, align=a.align, pool=a.pool,
                    lens_norm=a.lens_norm, english_grad=a.english_grad)
    check_order(method)
    return method


def check_order(method: Method) -> None:
    """Conversion must end before thinking does."""
    if method.lc != "none" and method.et != "none" and method.et_layer and method.lc_layer > method.et_layer:
        raise InputError(f"--lc_layer {method.lc_layer} lies above --et_layer {method.et_layer}; the model converts to "
                         "English first and thinks in it then, so expected lc_layer <= et_layer")


# ---------------------------------------------------------------------------------------------- one run

def main(argv=None):
    a = settings(argv)
    config = Config.read(a.model)
    method = make_method(a, config)
    if a.dry_run:
        print(plan(a, config, method))
        return
    device, rank, world = start(a)
    say = print if rank == 0 else lambda *_, **__: None

    tokenizer = Tokenizer(config)
    side = "english" if a.method == "sft" else "both" if method.signals() else "target"
    records, counts = make_records(read_parallel(a.data, a.data_en), tokenizer, side, a.max_length)
    if method.signals() and not counts.parallel:
        raise InputError(f"{a.data}: no record has instruction_en, input_en and output_en, which --method {a.method} "
                         "learns from; add them, give --data_en FILE, or use --method tft")
    say(f"data      {a.data}: {counts}")
    per_epoch = steps_per_epoch(len(records), a.batch_size)
    steps = a.steps or a.epochs * per_epoch

    model = build(config, method, a, device)
    chosen = [key for key in ("lc_layer", "et_layer") if getattr(a, key) == "auto"]
    if method.signals() and chosen:
        i, j, why = read_layers(model, records)
        method.lc_layer, method.et_layer = method.lc_layer or i, method.et_layer or j
        check_order(method)
        say(f"layers    i = {method.lc_layer}, j = {method.et_layer} of {config.num_layers} ({' and '.join(chosen)} auto: {why})")
    a.lc_layer, a.et_layer = method.lc_layer, method.et_layer
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)

    a.out = claim(a) if rank == 0 else None
    if world > 1:
        a.out = share(a.out)
    if rank == 0:
        write_json({**vars(a), "ranks": world, "steps": steps}, os.path.join(a.out, "settings.json"))
    say("settings  " + "  ".join(f"{k}={v}" for k, v in vars(a).items() if k not in (
        "dry_run", "world_size", "gpu_memory", "peak_tflops", "mfu")))
    say(f"run       {steps:,} steps of {a.batch_size} records ({per_epoch:,} an epoch) on {world} x {device.type}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters")

    metrics = open(os.path.join(a.out, "metrics.jsonl"), "a", encoding="utf-8") if rank == 0 else None
    bar = tqdm(range(steps), desc=a.method, unit="step", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in bar:
        began = time.perf_counter()
        batch = [records[n] for n in batch_of(step, len(records), a.batch_size, a.seed)]
        batches = deal(batch, a.micro_batch_tokens, method, config, rank, world)
        counts = total([sum(b.counts.get(term, 0) for b in batches) for term in TERMS]
                       + [sum(b.size() for b in batches)], device, world)
        lr = learning_rate(step, steps, a.lr, a.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(len(TERMS), device=device)
        for b in batches:
            losses = model(b)
            # The mean over the whole global batch; FSDP divides gradients by the ranks, hence `world`.
            loss = sum(method.weight(term) * value / max(counts[TERMS.index(term)], 1) for term, value in losses.items())
            (loss * world).backward()
            sums += torch.stack([losses[t].detach() if t in losses else sums.new_zeros(()) for t in TERMS])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        sums = total(sums.tolist(), device, world)
        if not math.isfinite(norm + sum(sums)):
            raise FloatingPointError(f"step {step + 1}: the loss or its gradient is not finite (gradient norm {norm}); "
                                     f"nothing was saved; a lower --lr than {a.lr} or --dtype fp32 may help")
        optimizer.step()
        optimizer.zero_grad()

        mean = {t: s / max(c, 1) if t == "tft" or t in method.signals() else None for t, s, c in zip(TERMS, sums, counts)}
        seconds = time.perf_counter() - began
        line = dict(step=step + 1, epoch=round((step + 1) / per_epoch, 4),
                    loss=sum(method.weight(t) * v for t, v in mean.items() if v is not None), **mean, lr=lr, grad_norm=norm,
                    tokens=int(counts[-1]), tokens_per_s=round(counts[-1] / seconds, 1), seconds=round(seconds, 4),
                    peak_mem_mib=round(peak_memory(device)))
        if metrics:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            bar.set_postfix_str(" ".join(f"{k}={line[k]:.3f}" for k in ("loss", *TERMS) if line[k] is not None)
                                + f" tok/s={line['tokens_per_s']:,.0f}")
    bar.close()

    out = os.path.join(a.out, "model")
    save(model.model, out, DTYPES[a.dtype])
    if dist.is_initialized():
        dist.destroy_process_group()            # what is left is rank 0's alone
    if rank == 0:
        report(a, out, device)


def start(a):
    """(device, rank, world size); under torchrun, the process group too."""
    kind = pick_device(a.device)
    if "RANK" not in os.environ:
        return torch.device(kind), 0, 1
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None), dist.get_rank(), dist.get_world_size()


def build(config: Config, method: Method, a, device) -> DFT:
    """The model with its weights, in fp32, sharded over the ranks if there are several.

    FSDP2: each layer is a group of its own, and embedding, final norm and head are one, the root's, so that a tied
    head stays tied. Weights are gathered in the compute dtype, gradients summed in fp32.
    """
    with torch.device("meta"):
        model = DFT(Transformer(config), method)
    model.model.compute_dtype = DTYPES[a.dtype]
    for layer in model.model.layers:
        layer.checkpointing = a.activation_checkpointing
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[a.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    fill(model.model, a.model)
    return model.train()


def read_layers(model: DFT, records: list, sample: int = 16):
    """choose_layers() on the mean entropy over the queries (not the English template) of the first parallel records."""
    picked = [r for r in records if r.query_en is not None and r.query[1] > r.query[0]][:sample]
    if not picked:
        picked = [r for r in records if r.query_en is not None][:1]
    tokens = Tokens.plain([r.prompt for r in picked], model.model.config.num_layers)
    places = [tokens.starts[n][0] + t for n, r in enumerate(picked) for t in range(*r.query)] or [0]
    return choose_layers(model((tokens, torch.tensor(places))).mean(1).tolist())


def deal(batch: list, budget: int, method: Method, config: Config, rank: int, world: int) -> list:
    """This rank's micro-batches of a global batch; every rank has equally many, as FSDP's collectives require."""
    sizes = [lay_out([record], method, config.num_layers).size() for record in batch]
    mine = micro_batches(sizes, budget, world)[rank::world]
    nothing = Record([config.bos_id], [])       # a rank without a record runs one token that nothing supervises
    return [lay_out([batch[n] for n in picked] or [nothing], method, config.num_layers) for picked in mine]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Cosine with warm-up. (1) Warm-up steps climb in equal parts and end at the peak; (2) then half a cosine to 0."""
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


def share(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def claim(a) -> str:
    """Make the folder of the run; InputError if it holds one already."""
    if a.out is None:
        name = f"{a.method}-{os.path.basename(os.path.normpath(a.model))}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        a.out = next(p for n in range(1, 10 ** 6) if not os.path.exists(p := os.path.join("runs", name + (f"-{n}" if n > 1 else ""))))
    elif os.path.isdir(a.out) and os.listdir(a.out):
        raise InputError(f"--out {a.out} holds {', '.join(sorted(os.listdir(a.out))[:3])}; give a new folder, or leave "
                         "--out away for a fresh one under runs/")
    try:
        os.makedirs(a.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {a.out}: {error.strerror}") from None
    return a.out


def peak_memory(device) -> float:
    """MiB: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def report(a, out: str, device) -> None:
    """The table before and after, and where the result lies."""
    question = "--prompt 'your question'"
    if a.test:
        print(f"\nanswers to {a.test}, right to the letter:\n")
        print(compare({"before": a.model, "after": out}, a.test, device, DTYPES[a.dtype]))
        question = f"--data {a.test}"
    print(f"\nmodel in {out}; next: python eval.py --model {out} {question}")


# ---------------------------------------------------------------------------------------------- planning

def plan(a, config: Config, method: Method) -> str:
    """What a run would take, from config.json and the data alone; the arithmetic stands beside each number."""
    with torch.device("meta"):
        model = Transformer(config)
    n = sum(p.numel() for p in model.parameters())
    per_layer = sum(p.numel() for p in model.layers[0].parameters())
    c, W, L, D, V = config, a.world_size, config.num_layers, config.hidden_size, config.vocab_size
    i, j = method.lc_layer or max(1, round(L * 2 / 32)), method.et_layer or max(1, round(L * 15 / 32))
    rows = read_parallel(a.data, a.data_en)
    side = "english" if a.method == "sft" else "both" if method.signals() else "target"
    try:
        records, counts = make_records(rows, Tokenizer(config), side, a.max_length)
        k, note = len(records), str(counts)
        P, A, X, Y, E = (sum(len(getattr(r, key) or []) for r in records) / k for key in
                         ("prompt", "answer", "query_en", "answer_en", "prompt_en"))
    except InputError as error:
        if os.path.exists(os.path.join(a.model, "tokenizer.model")) or os.path.exists(os.path.join(a.model, "tokenizer.json")):
            raise
        k, note = len(rows), f"{error}; taken: full length, --max_length {a.max_length}, half prompt and half answer"
        P = A = a.max_length / 2
        X, Y, E = (P, A, P) if side == "both" else (0, 0, 0)
    steps = a.steps or a.epochs * steps_per_epoch(k, a.batch_size)
    records_seen = min(steps * a.batch_size, steps * k)

    # Layer-tokens: how many layers each token passes through. 2 FLOPs a weight and token forward, twice that backward.
    x, y = X * (method.lc == "logits"), Y * (method.et == "logits")
    deep = (P + A) * L + x * i + y * j
    english = ((E + Y) * L if method.et == "feature" else E * i if method.lc == "feature" else 0)
    attend = 4 * c.num_heads * c.head_dim * (P + A) / 2                         # QK and AV, half of them masked
    flops = 3 * deep * (2 * per_layer + attend) + english * (2 * per_layer + attend) * (3 if a.english_grad else 1)
    flops += 2 * V * D * (3 * A + 2 * (x + y))                                  # the head; a frozen one has no gradient
    if a.activation_checkpointing:
        flops += deep * (2 * per_layer + attend)
    seconds = flops * records_seen / (W * a.peak_tflops * 1e12 * a.mfu)

    low, GB = DTYPES[a.dtype].itemsize, 1e9
    H, K, M = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    kept = 8 * D + low * (2 * D + 3 * H + 2 * K + 4 * M)        # bytes a token leaves in a layer until backward
    passed = min(a.micro_batch_tokens, (P + A + x + y) * a.batch_size / W)
    share_deep = deep / (L * (P + A + x + y))
    activations = passed * share_deep * L * kept
    if a.activation_checkpointing:
        activations = passed * (share_deep * L * low * D + kept)
    root = n - L * per_layer
    memory = {
        f"master weights, fp32: 4 x {n:,} / {W}": 4 * n / W,
        "gradients, fp32": 4 * n / W,
        "Adam's two moments, fp32": 8 * n / W,
        f"gathered weights, {a.dtype}: embedding, head, 2 layers": low * (root + 2 * per_layer) * (W > 1 or low == 2),
        f"gradients before their sum, {a.dtype}: the same, 1 layer": low * (root + per_layer) * (W > 1 or low == 2),
        f"activations of {passed:,.0f} tokens" + (" (checkpointed)" if a.activation_checkpointing else ""): activations,
        "logits of a chunk": (4 + 4 + low) * CHUNK,
    }
    need = sum(memory.values()) / GB
    lines = [f"{a.model}: {c.model_type}, {L} layers, {n:,} parameters ({per_layer:,} a layer), vocabulary {V:,}",
             f"data: {note}",
             f"mean tokens: prompt {P:.0f}, answer {A:.0f}" + (f", English query {X:.0f}, English answer {Y:.0f}" if X else "")
             + (f"; i = {i}, j = {j} of {L}" if method.signals() else ""),
             f"{steps:,} steps of {a.batch_size} records, {flops * records_seen / max(1, steps):.3e} FLOPs a step, "
             f"{flops * records_seen:.3e} in all",
             f"memory on each of {W} x {a.gpu_memory:g} GB, in GB (1e9 bytes):"]
    lines += [f"  {size / GB:8.2f}  {what}" for what, size in memory.items()]
    lines += [f"  {need:8.2f}  together: " + ("fits" if need < 0.92 * a.gpu_memory else
              "does NOT fit (8 % is left for the allocator); more GPUs, --activation_checkpointing or a smaller "
              "--micro_batch_tokens lower it"),
              f"time: {duration(seconds)} at {a.mfu:.0%} of {W} x {a.peak_tflops:g} TFLOP/s (set --mfu, --peak_tflops)"]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """93784 -> 26 h 3 min; 42.5 -> 42 s."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
