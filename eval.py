"""eval.py: what a model can do. Answers a prompt, or a file of questions, and counts the right answers by language.

    python eval.py --model runs/NAME/model --data demo/test.jsonl
    python eval.py --model runs/NAME/model --prompt "法国使用什么货币？"
"""
import argparse
import sys

import torch
from tqdm import tqdm

from data import Tokenizer, need, prompt_text, read_rows
from model import InputError, Transformer, generate, load

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def answer(model: Transformer, tokenizer: Tokenizer, queries: list, max_new_tokens: int = 64, rows: int = 64) -> list:
    """Greedy answers, as text, to (instruction, input) pairs in the Alpaca template, batches of `rows` at a time."""
    prompts = [[tokenizer.bos_id] + ids for ids in tokenizer.encode([prompt_text(*query) for query in queries])]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    out = [""] * len(prompts)
    for a in tqdm(range(0, len(order), rows), desc="answering", unit="batch", leave=False, disable=len(order) <= rows):
        picked = order[a:a + rows]
        for n, ids in zip(picked, generate(model, [prompts[n] for n in picked], max_new_tokens)):
            out[n] = tokenizer.decode(ids).strip()
    return out


def exact_match(model: Transformer, tokenizer: Tokenizer, rows: list) -> dict:
    """{language: (right answers, questions)} over read_rows() records; an answer is right if it equals the output."""
    answers = answer(model, tokenizer, [(need(*row, "instruction"), need(*row, "input")) for row in rows])
    score = {}
    for (place, row), text in zip(rows, answers):
        right, n = score.get(row.get("lang", "en"), (0, 0))
        score[row.get("lang", "en")] = (right + (text == need(place, row, "output").strip()), n + 1)
    return score


def compare(folders: dict, path: str, device: str, dtype) -> str:
    """A Markdown table: exact-match accuracy by language (rows) of several model folders {title: folder} (columns)."""
    rows, scores = read_rows(path), {}
    for title, folder in folders.items():
        model = load(folder, dtype, device)
        scores[title] = exact_match(model, Tokenizer(model.config), rows)
    lines = ["| language | questions | " + " | ".join(folders) + " |", "| --- " * (2 + len(folders)) + "|"]
    for lang in sorted(scores[title], key=lambda lang: (lang == "en", lang)):
        n = scores[title][lang][1]
        name = "en (retention)" if lang == "en" and len(folders) > 1 else lang
        lines.append(f"| {name} | {n} | " + " | ".join(f"{scores[t][lang][0] / n:.1%}" for t in folders) + " |")
    return "\n".join(lines)


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device found; use --device cpu, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder: a base model, or OUT/model of train.py")
    parser.add_argument("--data", help="JSONL of instruction, input, output, lang: accuracy by exact match, by language")
    parser.add_argument("--prompt", help="answer this one instruction")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer to --prompt (default 64)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.prompt is not None:
        model = load(args.model, DTYPES[args.dtype], device)
        print(answer(model, Tokenizer(model.config), [(args.prompt, "")], args.max_new_tokens)[0])
    elif args.data:
        print(compare({"exact match": args.model}, args.data, device, DTYPES[args.dtype]))
    else:
        raise InputError("nothing to do: give --data FILE or --prompt TEXT")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
