"""Our training step against what a user would write with transformers: same records, same objective, in turn.

    python tests/bench.py --model SmolLM2-135M --data zh.jsonl --records 8 --method dft-logits --dtype fp32

The peer runs padded batches with output_hidden_states=True and dense cross-entropy on the logits of all
places: one forward pass for the target-language answer, and for each inner logits loss one more, of the
prompt with the English text; for features, one without gradient of the English text. Both sides use fused
AdamW on fp32 weights and clip. Sides take turns, A B A B, each as a process of its own; a step is timed after
one that warms up. The losses of the two must agree before anything is printed. Times of noisy machines are
worth little: read the ratios.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from data import Tokenizer, make_records, read_parallel  # noqa: E402
from dft import TERMS, lay_out  # noqa: E402
from model import Config  # noqa: E402

RANKS = train.Ranks(torch.device("cpu"))


def prepare(a):
    """The settings and records that both sides train on."""
    s = train.settings(["--model", a.model, "--data", a.data, "--method", a.method, "--dtype", a.dtype,
                        "--lc_layer", str(a.lc_layer), "--et_layer", str(a.et_layer), "--device", "cpu"])
    config = Config.read(s.model)
    method = train.make_method(s, config)
    rows = read_parallel(s.data)[:a.records]
    records, _ = make_records(rows, Tokenizer(config), train.needed_side(s, method), s.max_length)
    return s, config, method, records


def ours(s, config, method, records):
    """One step's losses with gradients, by the one pass."""
    model = train.build(config, method, s, RANKS)

    def losses():
        mean = dict.fromkeys(TERMS, 0.0)
        batches = train.deal(records, s.micro_batch_tokens, method, config, RANKS)
        counts = {t: max(1, sum(b.counts.get(t, 0) for b in batches)) for t in TERMS}
        for batch in batches:
            sums = model(batch)
            sum(value / counts[t] for t, value in sums.items()).backward()
            for t, value in sums.items():
                mean[t] += value.item() / counts[t]
        return mean
    return model, losses


def peer(s, config, method, records):
    """The same by transformers, as one writes it first."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=s.dtype == "bf16")
    L, i, j = config.num_layers, method.lc_layer, method.et_layer

    def padded(pairs):
        """[(prompt, continuation)] -> ids, attention mask, labels (-100 where nothing is learned), (R, T)
        each."""
        size = max(len(p) + len(c) for p, c in pairs)
        ids = torch.tensor([p + c + [0] * (size - len(p) - len(c)) for p, c in pairs])
        labels = torch.tensor([[-100] * len(p) + c + [-100] * (size - len(p) - len(c)) for p, c in pairs])
        seen = torch.tensor([[1] * (len(p) + len(c)) + [0] * (size - len(p) - len(c)) for p, c in pairs])
        return ids, seen, labels

    def predict(pairs, layer):
        ids, seen, labels = padded(pairs)
        with bf16:
            out = model(ids, attention_mask=seen, output_hidden_states=True)
            if layer == L:
                logits = out.logits
            else:
                norm, frozen = model.model.norm, {"weight": model.model.norm.weight.detach()}
                norm = torch.func.functional_call(norm, frozen, (out.hidden_states[layer],))
                logits = F.linear(norm, model.lm_head.weight.detach())
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return loss, out, labels, seen

    def pooled(x, mask):
        return (x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def losses():
        mean = dict.fromkeys(TERMS, 0.0)
        loss, out, labels, seen = predict([(r.prompt, r.answer) for r in records], L)
        mean["tft"], parts = loss.item(), [loss]
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
                parts.append((1 - F.cosine_similarity(a, b, dim=-1)).mean())
                mean[term] = parts[-1].item()
        sum(parts).backward()
        del out, parts, loss
        for term, layer, key in (("lc", i, "query_en"), ("et", j, "answer_en")):
            if method.signals().get(term) == "logits":
                loss = predict([(r.prompt, getattr(r, key)) for r in records], layer)[0]
                loss.backward()
                mean[term] = loss.item()
        return mean
    return model, losses


def one_side(a):
    """Two steps of one side; the second is timed. Prints JSON."""
    s, config, method, records = prepare(a)
    model, losses = {"ours": ours, "peer": peer}[a.side](s, config, method, records)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0, fused=True)
    for _ in range(2):
        began = time.perf_counter()
        mean = losses()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        first = mean if _ == 0 else first
    print(json.dumps(dict(seconds=seconds, mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                          losses=first, tokens=lay_out(records, method, config.num_layers).size())))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--records", type=int, default=8)
    p.add_argument("--method", default="dft-logits", choices=["tft", "dft-logits", "dft-feature"])
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--lc_layer", type=int, default=2)
    p.add_argument("--et_layer", type=int, default=14)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return one_side(a)
    got = {"ours": [], "peer": []}
    for _ in range(a.repeats):
        for side in got:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True,
                                  stdout=subprocess.PIPE, text=True)
            got[side].append(json.loads(done.stdout.splitlines()[-1]))
    for term in TERMS:
        mine, theirs = (got[side][0]["losses"][term] for side in got)
        assert abs(mine - theirs) <= (1e-4 if a.dtype == "fp32" else 2e-2) * abs(theirs), (term, mine, theirs)
    seconds, mib = ({side: statistics.median(run[key] for run in got[side]) for side in got}
                    for key in ("seconds", "mib"))
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(got["ours"], got["peer"])]
    print(f"{a.method} {a.dtype}, {a.records} records, {got['ours'][0]['tokens']} tokens: step ours "
          f"{seconds['ours']:.2f} s, transformers {seconds['peer']:.2f} s, {statistics.median(ratios):.2f}x "
          f"faster ({min(ratios):.2f} to {max(ratios):.2f}); peak memory {mib['ours']:.0f} against "
          f"{mib['peer']:.0f} MiB, "
          f"{mib['ours'] / mib['peer']:.2f}x; losses agree: "
          + " ".join(f"{t} {got['ours'][0]['losses'][t]:.4f}" for t in TERMS))


if __name__ == "__main__":
    main()
