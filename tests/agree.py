"""eval.py against EleutherAI's lm-evaluation-harness: the same model and files, item by item.

    python tests/agree.py --model SmolLM2-135M --data EVAL_FILES --python LM_EVAL/bin/python

The harness uses its own task definitions, loops and scores; only the rows come from local files
instead of the hub. Both sides: fp32, softmax in fp32, BOS where the tokenizer itself puts it. The
harness's side runs in an environment of its own, the interpreter --python:

    pip install "lm_eval[hf]==0.4.13" "transformers==5.19.0"

(5.19.0 is the last with squad_metrics, which the harness's XQuAD imports.) --keep FOLDER holds the
items of both sides; a harness's side that is there is not computed again. Exit code 1 if a prompt,
a choice, a text or a score differs, or a log-likelihood by more than 1e-3.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Ours: (file, items, the harness's names)
TASKS = {
    "xcopa": ("xcopa/test.zh.jsonl", 500, ["xcopa_zh"]),
    "xnli": ("xnli/dev-zh.tsv", 500, ["xnli_zh"]),
    "truthfulqa": ("m_truthfulqa/zh_validation.json", 200,
                   ["truthfulqa_zh_mc1", "truthfulqa_zh_mc2"]),
    "xquad": ("xquad/xquad.zh.json", 100, ["xquad_zh"]),
}
TOLERANCE = 1e-3                # of a log-likelihood, and of a score that comes from them


def hub_rows(task, path):
    """The rows of a local file, with the hub's field names."""
    text = path.read_text(encoding="utf-8")
    if task == "xcopa":
        return [json.loads(line) for line in text.split("\n") if line]
    if task == "xnli":
        names = {"entailment": 0, "neutral": 1, "contradiction": 2}
        cells = [line.split("\t") for line in text.split("\n") if line]
        return [dict(premise=p, hypothesis=h, label=names[label]) for p, h, label in cells]
    if task == "truthfulqa":
        return json.loads(text)
    rows = []
    for article in json.loads(text)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in qa["answers"]]}
                rows.append({"context": paragraph["context"], **qa, "answers": answers})
    return rows


def our_file(task, path, folder):
    """The file for eval.py: XNLI's TSV as JSONL in a folder, other files as they are."""
    if task != "xnli":
        return path
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in hub_rows(task, path)]
    (folder / f"{path.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / f"{path.name}.jsonl"


def harness_item(sample):
    """A logged sample of the harness in the form of a line of eval.py --items."""
    prompt = sample["arguments"][0][0]
    if "f1" in sample:
        return dict(prompt=prompt, text=sample["filtered_resps"][0], f1=sample["f1"],
                    exact_match=sample["exact_match"])
    return dict(prompt=prompt, choices=[choice for _, choice in sample["arguments"]],
                loglikelihoods=[ll for ll, _ in sample["filtered_resps"]],
                score=float(sample["acc"]))


def harness(args, task, facts):
    """The harness's side of a task: items as {its name}.jsonl in --keep, facts as {task}.json."""
    os.environ["HF_HUB_OFFLINE"] = "1"                  # before anything of the hub is imported
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    rows = datasets.Dataset.from_list(hub_rows(task, Path(facts["data"]))[:facts["items"]])
    splits = dict.fromkeys(("train", "validation", "val", "test"), rows)    # train is never used
    datasets.load_dataset = lambda *_, **__: splits
    model = HFLM(pretrained=args.model, dtype="float32", softmax_dtype="float32", device="cpu",
                 batch_size=1 if task == "xquad" else 8)        # padding may turn a near tie
    tasks = TaskManager().load(TASKS[task][2])
    found = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
    for name in TASKS[task][2]:
        with open(args.keep / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
                file.write(json.dumps(harness_item(sample), ensure_ascii=False) + "\n")
        print(f"{name}: {found['results'][name]}")
    (args.keep / f"{task}.json").write_text(json.dumps({**facts, "lm_eval": lm_eval.__version__}))


def read_items(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def digest(*texts):
    """Of a prompt and its choices, the latter with the space before them; or of an answer."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def run_both(args, task, facts):
    """Run our side, and the harness's unless --keep has it; the harness's version."""
    kept = args.keep / f"{task}.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    paths = ["--model", args.model, "--data", args.data, "--keep", args.keep]
    if any(found.get(key) != value for key, value in facts.items()):
        subprocess.run([args.python, __file__, "harness", task, *paths, "--limit",
                        str(facts["items"])], check=True, stdout=sys.stderr)
    data = our_file(task, Path(facts["data"]), args.keep)
    subprocess.run([sys.executable, Path(__file__).parents[1] / "eval.py", "--model", args.model,
                    "--task", task, "--lang", "zh", "--data", data, "--template", "none",
                    "--limit", str(facts["items"]), "--items", args.keep / f"ours_{task}.jsonl",
                    "--device", "cpu"], check=True, stdout=sys.stderr)
    return json.loads(kept.read_text())["lm_eval"]


def view(name, item):
    """The part of an item of ours that belongs to a task of the harness, with one "score"."""
    if "text" in item:
        return item
    if not name.startswith("truthfulqa"):
        return dict(item, score=item["acc"])
    mc1 = item["gold"][0]                               # the choices of mc1 come first
    half = slice(mc1) if name.endswith("mc1") else slice(mc1, None)
    return dict(item, choices=item["choices"][half], loglikelihoods=item["loglikelihoods"][half],
                score=item[name[-3:]])


def differences(mine, peer):
    """What differs between our item and the harness's, and the largest gap of log-likelihoods."""
    found = [key for key in ("prompt", "text", "choices") if mine.get(key, []) != peer.get(key, [])]
    for key in ("score",) if "choices" in peer else ("exact_match", "f1"):
        found += [] if abs(mine[key] - peer[key]) <= TOLERANCE else [key]               # NaN, too
    gaps = [0.0]
    for a, b in zip(mine.get("loglikelihoods", []), peer.get("loglikelihoods", []), strict=True):
        gaps.append(abs(a - b))
    found += [] if all(gap <= TOLERANCE for gap in gaps) else ["loglikelihoods"]
    return found, max(gaps)


def frozen(mine, peer):
    """An item of the harness without the data set's text, and what is right in ours."""
    numbers = {k: peer[k] for k in ("loglikelihoods", "score", "exact_match", "f1") if k in peer}
    rest = {"said": digest(peer["text"])} if "text" in peer else {"gold": mine["gold"]}
    return {"asked": digest(peer["prompt"], *peer.get("choices", ())), **numbers, **rest}


def compare(args, facts):
    """Run both sides, print a table; 1 if anything differs."""
    store, failed = {}, 0
    print("task, items, largest difference of a log-likelihood, items that differ, the first one")
    for task in args.tasks:
        version = run_both(args, task, facts[task])
        ours = read_items(args.keep / f"ours_{task}.jsonl")
        for name in TASKS[task][2]:
            peers, different, largest = read_items(args.keep / f"{name}.jsonl"), [], 0.0
            for n, (mine, peer) in enumerate(zip(ours, peers, strict=True)):
                what, gap = differences(view(name, mine), peer)
                largest = max(largest, gap)
                different += [f"item {n}: {', '.join(what)}"] if what else []
            print(name, len(peers), f"{largest:.1e}", len(different), *different[:1], sep=", ")
            failed |= bool(different)
            pairs = zip(ours[:20], peers)
            store[name] = dict(lm_eval=version, items=[frozen(mine, peer) for mine, peer in pairs])
    if args.freeze:
        args.freeze.write_text(json.dumps(store).replace('{"asked', '\n{"asked') + "\n")
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("harness", nargs="*", metavar="harness TASK", help="the harness's side")
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--data", required=True, help="the folder of the files that TASKS names")
    p.add_argument("--python", default=sys.executable, help="the interpreter that has lm_eval")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--limit", type=int, help="at most so many items of each task")
    p.add_argument("--keep", type=Path, help="the folder for the items (default: a temporary one)")
    p.add_argument("--freeze", type=Path, help="write 20 items of each task as numbers and digests")
    args = p.parse_args()
    args.model, args.data = os.path.abspath(args.model), os.path.abspath(args.data)
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or Path(folder)
        args.keep.mkdir(parents=True, exist_ok=True)
        facts = {}
        for task, (file, items, _) in TASKS.items():
            facts[task] = dict(model=args.model, data=os.path.join(args.data, file),
                               items=min(items, args.limit or items))
        if args.harness:
            harness(args, args.harness[1], facts[args.harness[1]])
        else:
            sys.exit(compare(args, facts))


if __name__ == "__main__":
    main()
