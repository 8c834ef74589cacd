"""Our eval.py against EleutherAI's lm-evaluation-harness: the same model and files, item by item.

    python tests/agree.py --model SmolLM2-135M --data EVAL_FILES --python LM_EVAL/bin/python --keep dumps
    python tests/agree.py harness xcopa --model SmolLM2-135M --data EVAL_FILES --keep dumps

The harness runs its own task definitions, loops and scores; replaced is only where the rows come from: local
files instead of the hub. Both sides: fp32, softmax in fp32, BOS where the tokenizer itself puts one. The
second line is the harness's side of one task alone, which the first line starts by --python, as it asks for
packages of its own:

    pip install "lm_eval[hf]==0.4.13" "transformers==5.19.0"

(5.19.0 is the last with squad_metrics, which the harness's XQuAD imports.) --keep is a folder for the items
of both sides; what the harness found is not computed again where it lies there for the same model, file,
items and batch size. Rates are items per second of scoring: the harness's by a clock round its evaluate(),
ours by two commands, one with a single item, whose time is subtracted. Where others use the machine, believe
the ratio of the processors' time. Exit code 1 if a log-likelihood differs by more than 1e-3, or if a prompt,
a choice, a generated string or a score differs.
"""
import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Ours: (file, items, the harness's names)
TASKS = {
    "xcopa": ("xcopa/test.zh.jsonl", 500, ["xcopa_zh"]),
    "xnli": ("xnli/dev-zh.tsv", 500, ["xnli_zh"]),
    "truthfulqa": ("m_truthfulqa/zh_validation.json", 200, ["truthfulqa_zh_mc1", "truthfulqa_zh_mc2"]),
    "xquad": ("xquad/xquad.zh.json", 100, ["xquad_zh"]),
}
TOLERANCE = 1e-3                # of a log-likelihood, and of a score that comes of them
# What may differ, and the keys of an item that show it.
KINDS = {"prompt": ["prompt", "choices"], "log-likelihood": ["loglikelihoods"], "choice": ["loglikelihoods"],
         "string": ["text"], "score": ["score", "exact_match", "f1"]}


# ---------------------------------------------------------------------------------------------- the harness

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
    return [dict(context=p["context"], question=q["question"],
                 answers={key: [x[key] for x in q["answers"]] for key in ("text", "answer_start")})
            for article in json.loads(text)["data"] for p in article["paragraphs"] for q in p["qas"]]


def item_of(name, sample):
    """A logged sample of the harness as eval.py --items writes it; choices with the space before them."""
    prompt = sample["arguments"][0][0]
    item = dict(task=name, n=sample["doc_id"], prompt=prompt)
    if name == "xquad_zh":
        return dict(item, text=sample["filtered_resps"][0], gold=sample["doc"]["answers"]["text"],
                    exact_match=sample["exact_match"], f1=sample["f1"])
    assert all(context == prompt for context, _ in sample["arguments"])
    return dict(item, choices=[choice for _, choice in sample["arguments"]],
                loglikelihoods=[ll for ll, _ in sample["filtered_resps"]],
                gold=sample["target"], score=float(sample["acc"]))


def harness(a, task, facts):
    """The harness's side of one task: items as {its name}.jsonl in --keep, what it took as {task}.json."""
    os.environ["HF_HUB_OFFLINE"] = "1"                          # before anything of the hub is imported
    import datasets
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    names = TASKS[task][2]
    rows = datasets.Dataset.from_list(hub_rows(task, Path(facts["data"]))[:facts["items"]])
    splits = dict.fromkeys(("train", "validation", "val", "test"), rows)    # train: for examples, never used
    datasets.load_dataset = lambda *_, **__: splits
    tasks = TaskManager().load(names)
    model = HFLM(pretrained=a.model, dtype="float32", softmax_dtype="float32", device="cpu",
                 batch_size=facts["batch_size"])
    wall, cpu = time.perf_counter(), time.process_time()
    found = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
    facts.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, lm_eval=lm_eval.__version__,
                 transformers=transformers.__version__)
    for name in names:
        with open(a.keep / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"]):
                file.write(json.dumps(item_of(name, sample), ensure_ascii=False) + "\n")
    (a.keep / f"{task}.json").write_text(json.dumps(facts, indent=1))
    print(f"{task}: {facts['items']} items scored in {facts['wall']:.1f} s, {facts['cpu']:.1f} s of "
          f"processors, lm_eval {facts['lm_eval']}, transformers {facts['transformers']}")
    for name in names:
        print(f"{name}: {found['results'][name]}")


def theirs(a, task, facts):
    """What the harness's side took, from --keep where it lies there already."""
    report = a.keep / f"{task}.json"
    kept = json.loads(report.read_text()) if report.exists() else {}
    if any(kept.get(key) != value for key, value in facts.items()):
        subprocess.run([a.python, __file__, "harness", task, "--model", a.model, "--data", a.data,
                        "--keep", a.keep, "--batch_size", str(a.batch_size),
                        *(["--limit", str(a.limit)] if a.limit else [])], check=True, stdout=sys.stderr)
        kept = json.loads(report.read_text())
    return kept


# ---------------------------------------------------------------------------------------------- our side

def ours(a, task, facts):
    """What eval.py took, beyond what it takes for one item alone; its items lie in --keep."""
    took = []
    for limit in (1, facts["items"]):
        wall, cpu = time.perf_counter(), processors()
        subprocess.run([sys.executable, Path(__file__).parents[1] / "eval.py", "--model", a.model,
                        "--task", task, "--lang", "zh", "--data", facts["data"], "--limit", str(limit),
                        "--dtype", "fp32", "--device", "cpu", "--bos", "auto", "--template", "none",
                        "--out", a.keep / f"ours_{task}.json", "--items", a.keep / f"ours_{task}.jsonl"],
                       check=True, stdout=sys.stderr)
        took.append((time.perf_counter() - wall, processors() - cpu))
    return {key: more - one for key, one, more in zip(("wall", "cpu"), *took)}


def processors():
    """Seconds of processors that ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def view(name, item):
    """The part of an item of ours that answers to the harness's task of that name, with one "score".
    TruthfulQA's mc1 and mc2 stand in one item: its log-likelihoods under two keys, or in one list with gold =
    (choices of mc1, labels of mc2)."""
    if "text" in item:
        return item
    scores = item.get("score", item)                # eval.py may put the scores beside the other keys
    part = name[-3:] if name.startswith("truthfulqa") else "acc"
    item = dict(item, score=scores[part] if isinstance(scores, dict) else scores)
    if part != "acc" and "loglikelihoods_mc2" not in item:
        half = slice(item["gold"][0]) if part == "mc1" else slice(item["gold"][0], None)
        return dict(item, choices=item["choices"][half], loglikelihoods=item["loglikelihoods"][half])
    if part == "mc2":
        return dict(item, choices=None, loglikelihoods=item["loglikelihoods_mc2"])
    return item


# ---------------------------------------------------------------------------------------------- comparison

def read_items(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def extract(mine, item):
    """Of an item of the harness, what holds nothing of the data set's text; and what is right in ours."""
    numbers = {key: item[key] for key in ("loglikelihoods", "score", "exact_match", "f1") if key in item}
    said = dict(said=digest(item["text"])) if "text" in item else dict(gold=mine["gold"])
    return dict(asked=digest(item["prompt"], *item.get("choices", ())), **numbers, **said)


def digest(*texts):
    """Of texts, the choices with the space before them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def best(values):
    return values.index(max(values))


def compare(name, mine, peer):
    """Items of the two sides -> {kind: [numbers of items in which it differs]}, and the largest difference of
    a log-likelihood."""
    kinds, largest = {kind: [] for kind in KINDS}, 0.0
    assert len(mine) == len(peer), f"{name}: {len(mine)} items of ours, {len(peer)} of the harness"
    for n, (a, b) in enumerate(zip((view(name, item) for item in mine), peer)):
        said = b.get("choices", ())
        if a["prompt"] != b["prompt"] or a.get("choices") not in (said, [c[1:] for c in said], None):
            kinds["prompt"].append(n)
        if "text" in b:
            kinds["string"] += [n] * (a["text"] != b["text"])
            kinds["score"] += [n] * any(abs(a[key] - b[key]) > TOLERANCE for key in ("exact_match", "f1"))
            continue
        gaps = [abs(x - y) for x, y in zip(a["loglikelihoods"], b["loglikelihoods"], strict=True)]
        largest = max(largest, *gaps)
        kinds["log-likelihood"] += [n] * (not all(gap <= TOLERANCE for gap in gaps))        # NaN is caught
        kinds["choice"] += [n] * (best(a["loglikelihoods"]) != best(b["loglikelihoods"]))
        kinds["score"] += [n] * (not abs(a["score"] - b["score"]) <= TOLERANCE)
    return kinds, largest


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("harness", nargs="*", metavar="harness TASK", help="the harness's side of one task alone")
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--data", required=True, help="the folder with " + ", ".join(t[0] for t in TASKS.values()))
    p.add_argument("--python", default=sys.executable, help="the interpreter that has lm_eval")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--limit", type=int, help="at most so many items of each task")
    p.add_argument("--batch_size", type=int, default=8, help="the harness's, where it scores choices; it "
                   "generates by 1, as padding may turn a near tie")
    p.add_argument("--keep", type=Path, help="where the items go (default: nowhere)")
    p.add_argument("--freeze", type=Path, help="write the first 20 items of each task there, as numbers and "
                   "digests: tests/agreement.json")
    a = p.parse_args()
    a.model = os.path.normpath(a.model)
    if a.harness and (a.harness[0] != "harness" or a.harness[1:2] == [] or a.harness[1] not in TASKS):
        p.error(f"expected harness and one of {', '.join(TASKS)}")
    with tempfile.TemporaryDirectory() as folder:
        a.keep = a.keep or Path(folder)
        a.keep.mkdir(parents=True, exist_ok=True)
        facts = {task: dict(model=os.path.abspath(a.model), data=os.path.join(os.path.abspath(a.data), file),
                            items=min(items, a.limit or items),
                            batch_size=1 if task == "xquad" else a.batch_size)
                 for task, (file, items, _) in TASKS.items()}
        if a.harness:
            harness(a, a.harness[1], facts[a.harness[1]])
        else:
            sys.exit(table(a, facts))


def table(a, facts):
    """Runs both sides and prints what differs; 1 if anything does."""
    lines, notes, frozen = [], [], {}
    for task in a.tasks:
        items = facts[task]["items"]
        peer_took, took = theirs(a, task, facts[task]), ours(a, task, facts[task])
        rate, peer_rate = (items - 1) / took["wall"], items / peer_took["wall"]
        cpu = (items - 1) / took["cpu"] * peer_took["cpu"] / items
        for name in TASKS[task][2]:
            mine, peer = (read_items(a.keep / f"{n}.jsonl") for n in (f"ours_{task}", name))
            kinds, largest = compare(name, mine, peer)
            frozen[name] = dict(lm_eval=peer_took["lm_eval"], items=[extract(a, b) for a, b in zip(mine[:20], peer)])
            counts = ([f"{largest:.1e}", len(kinds["choice"]), ""] if "choices" in peer[0] else
                      ["", "", len(kinds["string"])])
            lines.append([name, len(peer), *counts, len(kinds["score"]), f"{rate:.2f}", f"{peer_rate:.2f}",
                          f"{rate / peer_rate:.2f}x", f"{cpu:.2f}x"])
            for kind, places in kinds.items():
                for n in places[:1]:
                    notes.append(f"{name}: another {kind} in {len(places)} of {len(peer)} items, first {n}:")
                    notes += [f"  {key}: ours {view(name, mine[n]).get(key)!r}, harness {peer[n][key]!r}"
                              for key in KINDS[kind] if key in peer[n]]
    print("| task | items | largest difference of a log-likelihood | other choices | other strings "
          "| other scores (F1) | ours, items/s | harness, items/s | ratio | ratio by processors' time |\n"
          + "| --- " * 10 + "|")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")
    for note in notes:
        print(note)
    if a.freeze:
        a.freeze.write_text(json.dumps(frozen).replace('{"asked', '\n{"asked') + "\n")
    return int(bool(notes))


if __name__ == "__main__":
    main()
