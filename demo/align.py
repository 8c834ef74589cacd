"""align.py: how near, layer by layer, a model's states of a sentence and of its translation are.

    python demo/align.py --model BEFORE AFTER --lang zh --data ZH --data_en EN --out align.json

A sentence's state is the mean over its tokens, without BOS, whose state is many times longer. For
each layer: the cosine of translations and of other pairs, and how often the nearest sentence of the
other language is the translation, from the target language and from English.
"""
import argparse
import json
import os
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval import Subject, markdown, read_flores  # noqa: E402
from model import DTYPES, InputError, Packed, pick_device  # noqa: E402


@torch.no_grad()
def states(subject: Subject, sentences: list):
    """Sentences -> their states after layers 0..L, (L + 1, n, D), of length 1."""
    L, vectors = subject.model.config.num_hidden_layers, []
    for ids in tqdm(subject.tokenizer.encode(sentences), "reading", leave=False):
        packed = Packed()
        packed.add([subject.tokenizer.bos_id, *ids], L)
        layers = subject.model(packed, tuple(range(L + 1))).values()            # (tokens, D) each
        vectors.append(torch.stack([x[1:].float().mean(0).cpu() for x in layers]))
    return F.normalize(torch.stack(vectors, 1), dim=-1)


def align(target, english) -> dict:
    """States (L + 1, n, D) of n sentences and of their translations -> L + 1 numbers each."""
    cosine = target @ english.transpose(1, 2)                                       # (L + 1, n, n)
    n, own = cosine.shape[1], cosine.diagonal(dim1=1, dim2=2).sum(1)
    others = (cosine.sum((1, 2)) - own) / max(1, n * n - n)
    found = {"n": n, "translations": (own / n).tolist(), "other pairs": others.tolist()}
    for name, dim in (("finds English", 2), ("found by English", 1)):
        found[name] = (cosine.argmax(dim) == torch.arange(n)).float().mean(1).tolist()
    return found


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, metavar="DIR", help="model folders")
    parser.add_argument("--data", required=True, help="a file of sentences")
    parser.add_argument("--data_en", required=True, help="their English translations")
    parser.add_argument("--lang", default="zh", choices=["zh", "vi", "ar"], help="other language")
    parser.add_argument("--limit", type=int, help="use the first sentences only")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="number format")
    args = parser.parse_args(argv)
    pairs = [row for _, row in read_flores(f"{args.lang}-en", args.data, args.data_en)][:args.limit]
    results = []
    for folder in args.model:
        subject = Subject(folder, DTYPES[args.dtype], pick_device(args.device))
        target = states(subject, [pair[args.lang] for pair in pairs])
        found = align(target, states(subject, [pair["en"] for pair in pairs]))
        columns = {"layer": range(len(target))}
        for name in ("translations", "other pairs", "finds English", "found by English"):
            columns[name] = [f"{value:.3f}" for value in found[name]]
        print(f"{folder}, {found['n']} sentences in {args.lang} and en\n")
        print(markdown(list(columns), list(zip(*columns.values()))) + "\n")
        results.append({"model": folder, "lang": args.lang, **found})
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
