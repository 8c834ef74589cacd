"""eval.py: what a model can do. Answers a prompt, or counts right answers to a file by language.

    python eval.py --model runs/NAME/model --data demo/test.jsonl
    python eval.py --model runs/NAME/model --prompt "法国使用什么货币？"
"""
import argparse
import sys

import torch
from tqdm import tqdm

from data import KEYS, Tokenizer, need, prompt_text, read_rows
from model import InputError, Transformer, generate, load

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def answer(model: Transformer, tokenizer: Tokenizer, queries: list, max_new_tokens: int = 64) -> list:
    """Greedy answers, as text, to (instruction, input) pairs in the Alpaca template."""
    prompts = [[tokenizer.bos_id] + ids for ids in tokenizer.encode([prompt_text(*q) for q in queries])]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    batches = [order[a:a + 64] for a in range(0, len(order), 64)]
    out = [""] * len(prompts)
    for batch in tqdm(batches, desc="answering", unit="batch", leave=False, disable=len(batches) < 2):
        for n, ids in zip(batch, generate(model, [prompts[n] for n in batch], max_new_tokens)):
            out[n] = tokenizer.decode(ids).strip()
    return out


def read_questions(path: str) -> list:
    """[(language, instruction, input, right answer)] of a file of records, "en" where lang is missing."""
    return [(str(row.get("lang", "en")), *(need(place, row, key) for key in KEYS))
            for place, row in read_rows(path)]


def exact_match(model: Transformer, tokenizer: Tokenizer, questions: list) -> dict:
    """{language: (right answers, questions)}; right is what equals the answer but for spaces around it."""
    score = {}
    answers = answer(model, tokenizer, [(instruction, input) for _, instruction, input, _ in questions])
    for (lang, _, _, output), text in zip(questions, answers):
        right, n = score.get(lang, (0, 0))
        score[lang] = right + (text == output.strip()), n + 1
    return score


def compare(folders: dict, path: str, device: str, dtype) -> str:
    """A Markdown table of exact match by language (rows) for model folders {title: folder} (columns)."""
    questions, scores = read_questions(path), {}
    for title, folder in folders.items():
        model = load(folder, dtype, device)
        scores[title] = exact_match(model, Tokenizer(model.config), questions)
    lines = ["| language | questions | " + " | ".join(folders) + " |", "| --- " * (2 + len(folders)) + "|"]
    for lang in sorted(scores[title], key=lambda lang: (lang == "en", lang)):
        name, n = "en (retention)" if lang == "en" and len(folders) > 1 else lang, scores[title][lang][1]
        shares = " | ".join(f"{score[lang][0] / n:.1%}" for score in scores.values())
        lines.append(f"| {name} | {n} | {shares} |")
    return "\n".join(lines)


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device found; use --device cpu, or a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder, such as train.py's OUT/model")
    p.add_argument("--data", help="JSONL of instruction, input, output, lang: exact match by language")
    p.add_argument("--prompt", help="answer this one instruction")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer to --prompt (default 64)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    a = p.parse_args()
    if a.prompt is None and a.data is None:
        raise InputError("nothing to do: give --data FILE or --prompt TEXT")
    device, dtype = pick_device(a.device), DTYPES[a.dtype]
    if a.prompt is not None:
        model = load(a.model, dtype, device)
        print(answer(model, Tokenizer(model.config), [(a.prompt, "")], a.max_new_tokens)[0])
    else:
        print(compare({"exact match": a.model}, a.data, device, dtype))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
