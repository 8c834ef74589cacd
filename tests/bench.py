"""Our training step against what a user would write with transformers: same records, same objective, in turn.

    python tests/bench.py --model SmolLM2-135M --data zh.jsonl --method dft-logits --dtype fp32
    python tests/bench.py --model DIR --shapes llama-2-7b --layers 4 --data zh.jsonl --device cuda
    python tests/bench.py --grow                                    how time and memory of our step grow

The peer runs padded batches of --peer_batch records, accumulating gradients (one batch of 32 records takes
more than 24 GiB), with output_hidden_states=True and dense cross-entropy on the logits of all places: one
forward pass for the target-language answer, and for each inner logits loss one more, of the
prompt with the English text; for features, one without gradient of the English text. --peer liger is the same
with Liger's kernels (--method tft, a GPU). Both sides use fused AdamW on fp32 weights, clip, and the same
compute dtype. Sides take turns, A B A B, each as a process of its own; a step is timed after one that warms
up, on a GPU an equal one, on a CPU one of --peer_batch records. The losses of the two must agree before
anything is printed. Times of noisy machines are worth little: read the ratios.

Of our step it counts the operations of all matrix products and of attention, as they are carried out
(torch's FlopCounterMode), measures the machine's rate on one large product in the same dtype just before and
after the step, and its rate of copying memory, and prints the share of that rate which the step reaches; on a
GPU also the model FLOPs' utilization, PaLM's definition on real tokens, of --peak_tflops. It counts what
torch.compile compiled after the warm-up. --profile says where the time of a CPU goes. --shapes takes random
weights of published shapes, cut to --layers (--model may then hold the tokenizer alone, of that vocabulary);
--length N makes records of random tokens, each of its four texts N / 2 long.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from data import Record, Tokenizer, make_records, read_parallel  # noqa: E402
from dft import TERMS, lay_out  # noqa: E402
from eval import DTYPES  # noqa: E402
from model import CARRIED, Config, Transformer, save, write_json  # noqa: E402

# hidden, MLP, layers, heads, key/value heads, head size, vocabulary
SHAPES = {"smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
          "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000),
          "gemma-2-2b": (2304, 9216, 26, 8, 4, 256, 256000)}


def random_model(a, folder):
    """A folder of random weights of --shapes, --layers deep, with the tokenizer of --model, if it has one."""
    D, M, L, H, K, h, V = SHAPES[a.shapes]
    gemma = a.shapes.startswith("gemma")
    write_json(dict(model_type="gemma2" if gemma else "llama", hidden_size=D, intermediate_size=M,
                    num_hidden_layers=a.layers or L, num_attention_heads=H, num_key_value_heads=K, head_dim=h,
                    vocab_size=a.vocab or V, max_position_embeddings=4096, rms_norm_eps=1e-5,
                    tie_word_embeddings=a.shapes != "llama-2-7b"), os.path.join(folder, "config.json"))
    model = Transformer(Config.read(folder))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.02)
    save(model, folder)
    for name in CARRIED if a.model else ():
        if os.path.exists(os.path.join(a.model, name)) and name != "generation_config.json":
            shutil.copyfile(os.path.join(a.model, name), os.path.join(folder, name))


def prepare(a):
    """The settings and records that both sides train on."""
    same = ("model", "data", "method", "dtype", "lc_layer", "et_layer", "device", "micro_batch_tokens",
            "compile")
    s = train.settings([word for key in same for word in (f"--{key}", str(getattr(a, key)))])
    config = Config.read(s.model)
    method = train.make_method(s, config)
    if a.length:
        g, half = torch.Generator().manual_seed(0), a.length // 2
        texts = torch.randint(3, config.vocab_size, (a.records, 5, half), generator=g).tolist()
        return s, config, method, [Record(*five, query=(1, half)) for five in texts]
    rows = read_parallel(s.data)[:a.records]
    records, _ = make_records(rows, Tokenizer(config), train.needed_side(s, method), s.max_length)
    return s, config, method, records


def ours(s, config, method, records):
    """One step's losses with gradients, by the one pass, of the records that are given to it."""
    ranks = train.start(s)
    model = train.build(config, method, s, ranks)

    def losses(records):
        mean = dict.fromkeys(TERMS, 0.0)
        batches = train.deal(records, s.micro_batch_tokens, method, config, ranks)
        counts = dict(zip(TERMS, ranks.total([sum(b.counts.get(t, 0) for b in batches) for t in TERMS])))
        for batch in batches:
            sums = model(batch)
            sum(value * ranks.world / counts[t] for t, value in sums.items()).backward()
            for t, value in sums.items():
                mean[t] += value.detach() / counts[t]
        return mean
    return model, losses


def peer(s, config, method, records, batch=8, liger=False):
    """The same by transformers, as one writes it first."""
    if liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Auto
    else:
        from transformers import AutoModelForCausalLM as Auto
    model = Auto.from_pretrained(s.model, dtype=torch.float32).to(s.device)
    bf16 = torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bf16")
    L, i, j = config.num_layers, method.lc_layer, method.et_layer

    def padded(pairs):
        """[(prompt, continuation)] -> ids, attention mask, labels (-100 where nothing is learned), (R, T)
        each."""
        size = max(len(p) + len(c) for p, c in pairs)
        ids = [p + c + [0] * (size - len(p) - len(c)) for p, c in pairs]
        labels = [[-100] * len(p) + c + [-100] * (size - len(p) - len(c)) for p, c in pairs]
        seen = [[1] * (len(p) + len(c)) + [0] * (size - len(p) - len(c)) for p, c in pairs]
        return (torch.tensor(t, device=s.device) for t in (ids, seen, labels))

    def predict(pairs, layer):
        ids, seen, labels = padded(pairs)
        with bf16:
            if liger:                                       # its fused loss, which needs no logits
                loss = model(ids, attention_mask=seen, labels=labels).loss
                return loss * (labels != -100).sum(), None, labels, seen
            out = model(ids, attention_mask=seen, output_hidden_states=True)
            if layer == L:
                logits = out.logits
            else:
                norm, frozen = model.model.norm, {"weight": model.model.norm.weight.detach()}
                norm = torch.func.functional_call(norm, frozen, (out.hidden_states[layer],))
                logits = F.linear(norm, model.lm_head.weight.detach())
                cap = getattr(model.config, "final_logit_softcapping", None)
                logits = cap * torch.tanh(logits / cap) if cap else logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return loss, out, labels, seen

    def pooled(x, mask):
        return (x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def losses(records):
        n, mean = len(records), dict.fromkeys(TERMS, 0.0)
        counts = {key: sum(len(getattr(r, key) or ()) for r in records)
                  for key in ("answer", "query_en", "answer_en")}
        for a in range(0, n, batch):
            for term, value in part(records[a:a + batch], n, counts).items():
                mean[term] += value
        return mean

    def part(records, n, counts):
        mean = {}
        loss, out, labels, seen = predict([(r.prompt, r.answer) for r in records], L)
        loss = loss / counts["answer"]
        mean["tft"], parts = loss.detach(), [loss]
        answers = labels != -100
        if "feature" in (method.lc, method.et):
            ids, seen_en, labels_en = padded([(r.prompt_en, r.answer_en) for r in records])
            with torch.no_grad(), bf16:
                h = model(ids, attention_mask=seen_en, output_hidden_states=True).hidden_states
            answers_en = labels_en != -100
            for term, a, b in (("lc", pooled(h[i], seen_en.bool() & ~answers_en),
                                pooled(out.hidden_states[i], seen.bool() & ~answers)),
                               ("et", pooled(h[L], answers_en),
                                pooled(out.hidden_states[j], answers))):
                parts.append((1 - F.cosine_similarity(a, b, dim=-1)).sum() / n)
                mean[term] = parts[-1].detach()
        sum(parts).backward()
        del out, parts, loss
        for term, layer, key in (("lc", i, "query_en"), ("et", j, "answer_en")):
            if method.signals().get(term) == "logits":
                loss = predict([(r.prompt, getattr(r, key)) for r in records], layer)[0] / counts[key]
                loss.backward()
                mean[term] = loss.detach()
        return mean
    return model, losses


def one_side(a):
    """A step of one side, timed after one that warms up. Prints JSON."""
    s, config, method, records = prepare(a)
    cuda = a.device == "cuda"
    model, losses = (ours(s, config, method, records) if a.side == "ours" else
                     peer(s, config, method, records, a.peer_batch, a.side == "liger"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, weight_decay=0, fused=True)     # weights stay

    def step(records):
        began, mean = time.perf_counter(), losses(records)
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        mean = {t: float(value) for t, value in mean.items()}
        if cuda:
            torch.cuda.synchronize()
        return mean, time.perf_counter() - began
    step(records if cuda else records[:a.peer_batch])       # memory is taken from the system, code compiled
    graphs, rates = counters["stats"]["unique_graphs"], [gemm_rate(s)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    mean, seconds = step(records)
    mib = (torch.cuda.max_memory_allocated() if cuda else
           resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 20
    rates.append(gemm_rate(s))
    tokens = lay_out(records, method, config.num_layers).size()
    if not int(os.environ.get("RANK", 0)):
        print(json.dumps(dict(seconds=seconds, mib=mib, losses=mean, tokens=tokens, gemm=sum(rates) / 2,
                              recompiled=counters["stats"]["unique_graphs"] - graphs,
                              real=sum(len(r.prompt) + len(r.answer) for r in records))))


def gemm_rate(s):
    """FLOP/s of one large matrix product in the compute dtype, over a third of a second or so."""
    n, times = (2048, 4) if s.device == "cpu" else (8192, 40)
    x = torch.randn(n, n, device=s.device, dtype=DTYPES[s.dtype])
    float((x @ x)[0, 0])
    began = time.perf_counter()
    for _ in range(times):
        y = x @ x
    float(y[0, 0])
    return times * 2 * n ** 3 / (time.perf_counter() - began)


def work(a):
    """What our step computes: FLOPs of matrix products and attention; and the machine's rate of copying."""
    s, config, method, records = prepare(a)
    s.compile = "no"                            # the same products, which the counter sees only uncompiled
    model, losses = ours(s, config, method, records)

    def attention(q, k, v, *rest, out_shape=None, **more):      # torch counts it on GPUs only
        (B, H, T, h), S = q, k[2]
        return 4 * B * H * h * (T * (S - T) + T * (T + 1) // 2)
    aten, name = torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    counted = {getattr(aten, name): attention, getattr(aten, name + "_backward"):
               lambda g, q, k, v, *rest, **more: attention(q, k, v) * 5 // 2}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        losses(records)
    kinds = {"matrix products": ("aten::mm", "addmm"), "attention": ("scaled_dot_product",),
             "softmax of the head": ("_log_softmax", "aten::exp_", "aten::gather"), "the rest": ("",)}
    shares = dict.fromkeys(kinds, 0.0)
    if a.profile:
        with torch.profiler.profile() as profile:
            losses(records)
        for event in profile.key_averages():
            kind = next(k for k in kinds if any(name in event.key for name in kinds[k]))
            shares[kind] += event.self_cpu_time_total
    y, took = torch.empty(2 ** 26, device=s.device), []
    for _ in range(8):
        began = time.perf_counter()
        float(y.clone()[0])
        took.append(time.perf_counter() - began)
    params = sum(p.numel() for p in model.parameters()) - (0 if config.tie_embeddings else
                                                           config.vocab_size * config.hidden_size)
    print(json.dumps(dict(shares=shares, flops=counter.get_total_flops(), copy=8 * len(y) / min(took),
                          params=params, layers=config.num_layers, width=config.num_heads * config.head_dim)))


def run(side, *more, ranks=0):
    """One side in a process of its own, or of `ranks` under torchrun, a thread each; its figures."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split() if ranks else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks else None
    done = subprocess.run([sys.executable, *launcher, __file__, *sys.argv[1:], *map(str, more), "--side",
                           side], check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


# What grows, one thing at a time, from 8 records of 256 tokens (128 in each of four texts), 8 layers of
# SmolLM2's shapes, i = 2, j = 4; the first of each row is what the others are compared with.
GROW = {"records of 256 tokens": [dict(records=n) for n in (8, 16, 32)],
        "tokens a record, 4,096 in all": [dict(length=n, records=4096 // n) for n in (128, 512, 2048)],
        "vocabulary": [dict(vocab=n) for n in (32000, 128000, 256000)],
        "layers": [dict(layers=n) for n in (4, 8, 16)],
        "i": [dict(lc_layer=n) for n in (1, 2, 4)],
        "j": [dict(et_layer=n) for n in (2, 4, 8)],
        "method": [dict(method=m) for m in ("tft", "dft-logits", "dft-feature")],
        "gloo ranks, a thread each": [dict(ranks=n) for n in (1, 2)]}


def grow(a):
    """A table of time and memory of our step."""
    base = dict(shapes="smollm2-135m", layers=8, length=256, records=8, lc_layer=2, et_layer=4,
                micro_batch_tokens=1024, peer_batch=4)
    print("| what grows | values | seconds | times | MiB |\n| --- | --- | --- | --- | --- |")
    for what, points in GROW.items():
        rows = []
        for point in points:
            given = {**base, **point}
            ranks = given.pop("ranks", 0)
            with tempfile.TemporaryDirectory() as folder:
                random_model(argparse.Namespace(**{"model": None, "vocab": None, **given}), folder)
                given["model"] = folder
                more = [word for key, value in given.items() for word in (f"--{key}", value)]
                one = [run("ours", *more, ranks=ranks) for _ in range(a.repeats)]
            seconds = statistics.median(o["seconds"] for o in one)
            rows.append((list(point.values())[0], seconds, one[0]["mib"]))
        print(f"| {what} | {', '.join(str(r[0]) for r in rows)} | {', '.join(f'{r[1]:.2f}' for r in rows)} | "
              f"{', '.join(f'{r[1] / rows[0][1]:.2f}' for r in rows)} | "
              f"{', '.join(f'{r[2]:,.0f}' for r in rows)} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model")
    p.add_argument("--data")
    p.add_argument("--records", type=int, default=32)
    p.add_argument("--method", default="dft-logits", choices=["tft", "dft-logits", "dft-feature"])
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--lc_layer", type=int, default=2)
    p.add_argument("--et_layer", type=int, default=14)
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--peer", default="peer", choices=["peer", "liger", "none"])
    p.add_argument("--peer_batch", type=int, default=8)
    p.add_argument("--shapes", choices=SHAPES)
    p.add_argument("--layers", type=int)
    p.add_argument("--vocab", type=int)
    p.add_argument("--length", type=int)
    p.add_argument("--micro_batch_tokens", type=int, default=4096)
    p.add_argument("--compile", default="auto", choices=["auto", "yes", "no"])
    p.add_argument("--grow", action="store_true")
    p.add_argument("--profile", action="store_true")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--peak_tflops", type=float, default=989.0, help="989 is an H100 SXM in dense bf16")
    p.add_argument("--side", choices=["ours", "peer", "liger", "work"], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return work(a) if a.side == "work" else one_side(a)
    if a.grow:
        return grow(a)
    with tempfile.TemporaryDirectory() as folder:
        if a.shapes:
            random_model(a, folder)
            sys.argv += ["--model", folder, "--shapes", a.shapes]
        compare(a)


def compare(a):
    """Both sides in turn; one line of figures."""
    sides = ["ours"] + [a.peer] * (a.peer != "none")
    got = {side: [] for side in sides}
    for _ in range(a.repeats):
        for side in sides:
            got[side].append(run(side))
    mine = got["ours"][0]
    for term in TERMS if a.peer == "peer" else ():
        theirs = got["peer"][0]["losses"][term]
        assert abs(mine["losses"][term] - theirs) <= (1e-4 if a.dtype == "fp32" else 2e-2) * abs(theirs), (
            term, mine, theirs)
    seconds, mib = ({side: statistics.median(one[key] for one in got[side]) for side in sides}
                    for key in ("seconds", "mib"))
    done = run("work")
    share = statistics.median(done["flops"] / one["seconds"] / one["gemm"] for one in got["ours"])
    print(f"{a.method} {a.dtype}, {a.records} records, {mine['real']} tokens of prompts and answers, "
          f"{mine['tokens']} with the English ones: {seconds['ours']:.2f} s, "
          f"{mine['real'] / seconds['ours']:.0f} tokens/s, {mib['ours']:.0f} MiB; "
          f"{done['flops'] / 1e12:.2f} TFLOP at {share:.0%} of {mine['gemm'] / 1e9:.0f} GFLOP/s "
          f"(copies {done['copy'] / 1e9:.1f} GB/s); losses "
          + " ".join(f"{t} {v:.4f}" for t, v in mine["losses"].items())
          + f"; compiled after the warm-up: {mine['recompiled']}")
    if a.profile:
        print("; ".join(f"{k} {v / sum(done['shares'].values()):.0%}" for k, v in done["shares"].items()))
    if a.device == "cuda":
        flops = 6 * done["params"] + 12 * done["layers"] * done["width"] * mine["real"] / a.records
        print(f"MFU on real tokens: {flops * mine['real'] / seconds['ours'] / a.peak_tflops / 1e12:.1%}")
    if a.peer != "none":
        ratios = [theirs["seconds"] / one["seconds"] for one, theirs in zip(got["ours"], got[a.peer])]
        print(f"{a.peer}: {seconds[a.peer]:.2f} s, {mib[a.peer]:.0f} MiB: ours is "
              f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}) in "
              f"{mib['ours'] / mib[a.peer]:.2f} x the memory")


if __name__ == "__main__":
    main()
