"""Time and memory of a training step, compared with transformers, Liger or another checkout.

    python tests/bench.py --model SmolLM2-135M --data zh.jsonl --method dft-logits --dtype fp32
    python tests/bench.py --model SmolLM2-135M --data zh.jsonl --peer ../before
    python tests/bench.py --shapes llama-2-7b --layers 8 --et_layer 4 --device cuda   needs no files
    python tests/bench.py --shapes gemma-2-2b --device cuda --dtype bf16 --side ours --profile FILE

--peer transformers: the same losses, written in the simplest way. It runs padded batches of
--peer_batch records and accumulates their gradients. Each pass runs all layers, keeps all hidden
states and computes logits at all positions: one pass for the target-language answer, one more for
each inner loss by logits (the prompt with the English text) or, for features, one without gradient
for the English text. It runs without our settings of malloc, oneDNN and cuDNN.
--peer liger: the same with Liger's kernels (--method tft on a GPU).
With --shapes the weights are random. Without --data so are the ids, at lengths like Alpaca's.
--peer FOLDER: another checkout of this project, such as the commit before.

The sides take turns, A B A B, each in its own process. After a first step, which on a CPU takes
only --peer_batch records, one step is timed on a CPU and three on a GPU, whose median counts.
Their losses must agree; those of another checkout may differ and are then printed. Times of a busy
machine vary, so read the ratios.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import train  # noqa: E402
from data import Record, Tokenizer, make_records, micro_batches, read_parallel  # noqa: E402
from dft import lay_out  # noqa: E402
from model import Config, Transformer, cap, save, write_json  # noqa: E402

# hidden, MLP, layers, heads, key/value heads, head size, vocabulary
SHAPES = {"smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
          "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000),
          "gemma-2-2b": (2304, 9216, 26, 8, 4, 256, 256000),
          "tiny": (64, 96, 4, 4, 2, 16, 512)}
RANDOM = "random ids"           # in place of a file of --data
SETTINGS = "model data method dtype lc_layer et_layer device compile micro_batch_tokens".split()


def flags(args, names):
    return [f"--{name}={getattr(args, name)}" for name in names]


def random_model(shapes, layers, folder, tokenizer=None, device="cpu"):
    """Write a folder of random bf16 weights, with the tokenizer of another folder if given."""
    D, M, L, H, K, h, V = SHAPES[shapes]
    write_json(dict(model_type="gemma2" if shapes.startswith("gemma") else "llama",
                    hidden_size=D, intermediate_size=M, num_hidden_layers=layers or L,
                    num_attention_heads=H, num_key_value_heads=K, head_dim=h, vocab_size=V,
                    max_position_embeddings=4096, tie_word_embeddings=shapes != "llama-2-7b"),
               os.path.join(folder, "config.json"))
    with torch.device(device):
        model = Transformer(Config.read(folder))
    if tokenizer:
        model.config.files = Config.read(tokenizer).files
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data.normal_(0, 0.02)
    save(model, folder, torch.bfloat16)


def random_records(count, vocab_size):
    """Parallel records of random ids, as long as those of Chinese Alpaca in LLaMA-2's tokens: on
    average a prompt of 75 tokens and an answer of 108, in English a query of 20 and an answer of
    62."""
    length, token, records = random.Random(13), random.Random(0), []

    def ids(n):
        return [token.randrange(3, vocab_size) for _ in range(n)]

    for _ in range(count):          # the template has 39 tokens, 30 of them before the query
        query, answer = length.randint(5, 35), 1 + min(280, int(length.lognormvariate(3.66, 1)))
        longer, answer_zh = round(1.8 * query), round(1.73 * answer)
        records.append(Record(ids(39 + longer), ids(answer_zh), (30, 30 + longer), ids(query),
                              ids(answer), ids(39 + query), (30, 30 + query)))
    return records


# -------------------------------------------------------------------------------------- the sides

def prepare(args):
    """(settings of train.py, Config, Method, records) that both sides train on."""
    names = SETTINGS if args.method.startswith("dft") else [
        name for name in SETTINGS if not name.endswith("_layer")]
    settings = train.parse(flags(args, names))
    config = Config.read(settings.model)
    method = train.make_method(settings, config)
    side = "both" if method.signals() else "target"
    if settings.data == RANDOM:
        return settings, config, method, random_records(args.records, config.vocab_size)
    rows = read_parallel(settings.data)[:args.records]
    records, _ = make_records(rows, Tokenizer(config), side, settings.max_length)
    return settings, config, method, records


def backward(sums, counts, means):
    """Add value / count of each loss to means, and the gradient of their sum to the model's."""
    loss = 0.0
    for term, value in sums.items():
        loss = loss + value / counts[term]
        means[term] = means.get(term, 0.0) + value.detach() / counts[term]
    loss.backward()


def ours(settings, config, method, records, model=None):
    """(model, a function: records -> {term: mean loss}, which adds to the model's gradients)."""
    model = model or train.build(config, method, settings, train.start(settings))
    model.method, L = method, config.num_hidden_layers

    def losses(records):
        sizes = [lay_out([record], method, L).tokens for record in records]
        parts = micro_batches(sizes, settings.micro_batch_tokens, 1)
        batches = [lay_out([records[n] for n in part], method, L) for part in parts]
        counts, means = sum((Counter(batch.counts) for batch in batches), Counter()), {}
        for batch in batches:
            backward(model(batch), counts, means)
        return means

    return model, losses


def peer(settings, config, method, records, model=None, batch=8, liger=False):
    """The same as ours(), by transformers or Liger, in padded batches."""
    if liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Auto
    else:
        from transformers import AutoModelForCausalLM as Auto
    i, j, L = method.lc_layer, method.et_layer, config.num_hidden_layers
    if model is None:
        model = Auto.from_pretrained(settings.model, dtype=torch.float32).to(settings.device)
    autocast = torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16")

    def padded(rows, value=0):
        rows = [torch.tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value).to(settings.device)

    def run_model(texts, **more):
        """transformers' output for a padded batch of R [(prompt, continuation)]."""
        ids = padded([prompt + text for prompt, text in texts])
        seen = padded([[1] * len(prompt + text) for prompt, text in texts])
        with autocast:
            return model(ids, attention_mask=seen, output_hidden_states=not liger, **more)

    def predict(texts, layer):
        """(cross-entropy of the continuations, summed; the L + 1 hidden states, (R, T, D) each, or
        None with Liger)."""
        labels = padded([[-100] * len(prompt) + list(text) for prompt, text in texts], -100)
        if liger:                   # its fused loss, a mean, makes no logits
            return run_model(texts, labels=labels).loss * (labels != -100).sum(), None
        out = run_model(texts)
        logits, norm = out.logits, model.model.norm
        if layer < L:
            with autocast:
                x = torch.func.functional_call(norm, {"weight": norm.weight.detach()},
                                               out.hidden_states[layer])
                logits = F.linear(x, model.lm_head.weight.detach())
                logits = cap(logits, config.final_logit_softcapping)
        logits = logits[:, :-1].float().flatten(0, 1)                           # (R * (T - 1), V)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"), out.hidden_states

    def pooled(x, ranges):
        """The mean of x (R, T, D) over the tokens first..end-1 of each row, (R, D)."""
        return torch.stack([row[first:end].float().mean(0) for row, (first, end) in zip(x, ranges)])

    def features(part, h):
        """{term: 1 - cos, summed} for records with the hidden states h of prompts and answers."""
        with torch.no_grad():
            h_en = run_model([(r.prompt_en, r.answer_en) for r in part]).hidden_states
        lc = F.cosine_similarity(pooled(h_en[i], [r.prompt_en_query for r in part]),
                                 pooled(h[i], [r.query for r in part]))
        ranges = [(len(r.prompt), len(r.prompt + r.answer)) for r in part]
        ranges_en = [(len(r.prompt_en), len(r.prompt_en + r.answer_en)) for r in part]
        et = F.cosine_similarity(pooled(h_en[L], ranges_en), pooled(h[j], ranges))
        return {"lc": (1 - lc).sum(), "et": (1 - et).sum()}

    def losses(records):
        counts, means = lay_out(records, method, L).counts, {}
        for begin in range(0, len(records), batch):
            part = records[begin:begin + batch]
            tft, h = predict([(r.prompt, r.answer) for r in part], L)
            english = features(part, h) if method.lc == "feature" else {}
            backward({"tft": tft, **english}, counts, means)
            del tft, english, h                 # frees them before the next pass
            if method.lc == "logits":
                lc, _ = predict([(r.prompt, r.query_en) for r in part], i)
                backward({"lc": lc}, counts, means)
                et, _ = predict([(r.prompt, r.answer_en) for r in part], j)
                backward({"et": et}, counts, means)
        return means

    return model, losses


def one_side(args):
    """Time a step of one side for each of args.cases and print the figures as JSON lines."""
    model = None
    for case in args.cases.split(","):
        name, size = case.split(":")
        args.method = name
        settings, *_, records = given = prepare(args)
        if args.side == "ours":
            settings.micro_batch_tokens = int(size)
            model, losses = ours(*given, model)
        else:
            model, losses = peer(*given, model, int(size), liger=args.side == "liger")
        answers = sum(len(record.answer) for record in records)
        tokens = answers + sum(len(record.prompt) for record in records)
        print(json.dumps(dict(case=case, tokens=tokens, answer_tokens=answers,
                              **time_step(args, settings, model, losses, records))), flush=True)


def time_step(args, settings, model, losses, records):
    """Seconds, memory and losses of a step on the records, and seconds of the first one."""
    gpu = args.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, fused=True)     # weights stay equal

    def step(records):
        began, means = time.perf_counter(), losses(records)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        means = {term: float(value) for term, value in means.items()}       # waits for the GPU
        return means, time.perf_counter() - began

    _, first = step(records if gpu else records[:args.peer_batch])
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    means, seconds = step(records)
    if gpu:
        seconds = statistics.median([seconds, step(records)[1], step(records)[1]])
    mib = train.peak_memory(torch.device(settings.device))
    if args.profile:
        with torch.profiler.profile() as profile:
            step(records)
        averages = profile.key_averages()
        name = f"{args.profile}-{settings.method}-{settings.micro_batch_tokens}.txt"
        with open(name, "w", encoding="utf-8") as file:
            for device in ("device", "cpu") if gpu else ("cpu",):
                file.write(averages.table(sort_by=f"self_{device}_time_total", row_limit=40,
                                          max_name_column_width=90))
    return dict(seconds=seconds, first=first, losses=means, mib=mib)


# --------------------------------------------------------------------------------- the comparison

def figures(args, side):
    """Run one side, "ours", "transformers", "liger" or a checkout, in a process of its own. Returns
    its figures."""
    checkout, side = (side, "ours") if os.path.isdir(side) else (ROOT, side)
    command = [sys.executable, os.path.join(checkout, "tests", "bench.py"), "--side", side,
               *flags(args, (*SETTINGS, "records", "peer_batch"))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args):
    """Run the sides in turn and print their figures."""
    here, there = [], []
    for _ in range(args.repeats):
        here.append(figures(args, "ours"))
        there.append(figures(args, args.peer))
    if there[0].get("tokens") != here[0]["tokens"] and args.data == RANDOM:
        sys.exit(f"{args.peer} draws other random records; give --data")
    for term, loss in here[0]["losses"].items():
        other = there[0]["losses"][term]
        bound = (1e-4 if args.dtype == "fp32" else 2e-2) * abs(other)
        if not abs(loss - other) <= bound:              # also for NaN
            print(f"the loss {term} differs: {loss} here, {other} in {args.peer}")
            if not os.path.isdir(args.peer):
                sys.exit(1)
    tokens = here[0]["tokens"]
    print(f"{args.method} {args.dtype}, {args.records} records, {tokens:,} tokens of prompts and "
          f"answers; losses {here[0]['losses']}")
    for name, side in (("ours", here), (args.peer, there)):
        seconds = statistics.median(one["seconds"] for one in side)
        print(f"{name}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, "
              f"{side[0]['mib']:,.0f} MiB")
    times = [a["seconds"] / b["seconds"] for a, b in zip(here, there)]
    print(f"ours / {args.peer}: time {statistics.median(times):.3f} ({min(times):.3f} to "
          f"{max(times):.3f}), memory {here[0]['mib'] / there[0]['mib']:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; with --shapes, only for its tokenizer")
    parser.add_argument("--data", default=RANDOM, help="parallel records; default: random ids")
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--method", default="dft-logits",
                        choices=["tft", "dft-logits", "dft-feature"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--lc_layer", type=int, default=2)
    parser.add_argument("--et_layer", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peer", default="transformers", help="transformers, liger, or a checkout")
    parser.add_argument("--peer_batch", type=int, default=8)
    parser.add_argument("--shapes", choices=SHAPES, help="random weights of published shapes")
    parser.add_argument("--layers", type=int, help="number of layers of --shapes")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("--compile", default="auto", choices=["auto", "yes", "no"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--side", choices=["ours", "transformers", "liger"],
                        help="run and time one side in this process; print JSON")
    parser.add_argument("--cases", help="with --side: METHOD:SIZE,..., a size in tokens of a "
                        "micro-batch or, for a peer, in records of a batch")
    parser.add_argument("--profile", metavar="FILE",
                        help="with --side: profile one more step, to FILE-METHOD-SIZE.txt")
    args = parser.parse_args()
    if not args.side and (args.cases or args.profile) or args.layers and not args.shapes:
        parser.error("--cases and --profile need --side, --layers needs --shapes")
    with tempfile.TemporaryDirectory() as folder:
        if args.shapes:
            random_model(args.shapes, args.layers, folder, args.model, args.device)
            args.model = folder
        size = args.micro_batch_tokens if args.side == "ours" else args.peer_batch
        args.cases = args.cases or f"{args.method}:{size}"
        one_side(args) if args.side else compare(args)


if __name__ == "__main__":
    main()
