"""study.py: the demo with every method and several seeds: a CSV file and Markdown tables.

    python demo/study.py                            everything: about 4 hours on 2 CPU cores
    python demo/study.py --methods tft dft-logits   some methods
    python demo/study.py --table                    only print the tables of the CSV file
    python demo/study.py --real DIR --data zh.jsonl --tests xcopa.zh=FILE       a real model

Every run trains the demo model with train.py and scores it on demo/test.jsonl with eval.py. To
stop and continue later, start the same command again: finished runs are kept in --out and not
repeated. The learning rate and the number of epochs were chosen with --grid, which trains only
tft, on 613 of the 713 facts, and prints its score on the questions about the other 100. With --real
the model DIR is trained on the first --records parallel records of --data; it is scored by its loss
on the answers of the last --held records, in both languages, and by benchmarks.
"""
import argparse
import csv
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TRAIN, TEST = os.path.join(HERE, "train.jsonl"), os.path.join(HERE, "test.jsonl")
CSV = os.path.join(HERE, "study.csv")
LANGUAGES = ("zh", "vi", "ar")
SETTINGS = ["--dtype", "fp32", "--batch_size", "32", "--lr", "5e-4", "--epochs", "3"]
# The switches for --real, later ones count
REAL = ["--dtype", "bf16", "--batch_size", "16", "--lr", "2e-5", "--epochs", "1"]
# {method: (switches of train.py, number of seeds)}; --english 1.0 if no other share is given
METHODS = {
    "tft": (["--method", "tft"], 5),
    "dft-logits": ([], 5),
    "--lc none": (["--lc", "none"], 5),
    "--et none": (["--et", "none"], 3),
    "--lc feature": (["--lc", "feature"], 3),
    "--lc none --et feature": (["--lc", "none", "--et", "feature"], 3),
    "dft-feature": (["--method", "dft-feature"], 3),
    "--align position": (["--align", "position"], 3),
    "qalign, then sft": (["--method", "qalign"], 3),
    "tft --train_layers 1-3": (["--method", "tft", "--train_layers", "1-3"], 3),
    "--et_layer 4": (["--lc_layer", "1", "--et_layer", "4"], 5),
    "--et_layer 5": (["--lc_layer", "1", "--et_layer", "5"], 5),
    "--lc none --et_layer 5": (["--lc", "none", "--et_layer", "5"], 5),
    "both weights 0.5": (["--lc_weight", "0.5", "--et_weight", "0.5"], 3),
    "both weights 2": (["--lc_weight", "2", "--et_weight", "2"], 3),
    "tft --english 0": (["--method", "tft", "--english", "0"], 3),
    "dft-logits --english 0": (["--english", "0"], 3),
    "--lc none --english 0": (["--lc", "none", "--english", "0"], 3),
}
PAIRS = [("dft-logits", "tft"), ("--lc none", "tft"), ("--lc none", "dft-logits"),
         ("--et_layer 4", "dft-logits"), ("--et_layer 5", "dft-logits"),
         ("--lc none --et_layer 5", "--lc none")]
# Student's t: the 97.5 % quantile for n - 1 degrees of freedom
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def call(program: str, *arguments) -> None:
    """Run a program of this project; its output goes to stderr."""
    command = [sys.executable, os.path.join(ROOT, program), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def train(out: str, model: str, switches: list, seed: int, data: str = TRAIN) -> str:
    """Train in the folder OUT unless it has been done -> the folder of the model."""
    result = os.path.join(out, "model")
    if not os.path.exists(os.path.join(result, "config.json")):
        english = [] if "--english" in switches or "sft" in switches else ["--english", "1.0"]
        call("train.py", "--model", model, "--data", data, "--out", out, "--seed", seed, *SETTINGS,
             *english, *switches)
    return result


def score(out: str, model: str) -> dict:
    """The scores of a model on the test questions, in percent, kept in the folder OUT."""
    scores, lens = os.path.join(out, "scores.json"), os.path.join(out, "lens.json")
    if not os.path.exists(scores):
        call("eval.py", "--model", model, "--task", "lens", "--data", TEST, "--lang", "zh",
             "--limit", 100, "--out", lens)
        call("eval.py", "--model", model, "--data", TEST, "--out", scores)
    row, own = {}, []
    with open(scores, encoding="utf-8") as file:
        for result in json.load(file):
            found = result["scores"]
            row[result["lang"]] = round(100 * found["exact_match"]["mean"], 1)
            if result["lang"] in LANGUAGES:
                own.append(100 * found["in_language"]["mean"])
    row["mean"] = round(statistics.fmean(row[lang] for lang in LANGUAGES), 2)
    row["wrong_language"] = round(100 - statistics.fmean(own), 1)
    with open(lens, encoding="utf-8") as file:
        row["p_english"] = round(json.load(file)[0]["p_english"][3], 3)         # after layer 3
    return row


def run(args, pretrained: str, method: str, seed: int) -> dict:
    """One line of the CSV file."""
    name = re.sub("[^a-z0-9.]+", "-", method).strip("-")
    model = os.path.join(HERE, "model") if pretrained == "demo" else args.second
    out = os.path.join(args.out, pretrained, f"{name}-{seed}")
    result = train(out, model, METHODS[method][0], seed)
    if method.startswith("qalign"):             # the second stage starts from the first
        out += "-sft"
        result = train(out, result, ["--method", "sft"], seed)
    return {"pretrained": pretrained, "method": method, "seed": seed, **score(out, result)}


def grid(args) -> None:
    """Score tft on held-out facts for several learning rates and numbers of epochs."""
    rows, pairs = [], set()
    with open(TRAIN, encoding="utf-8") as file:
        for line in file:
            question = json.loads(line)["instruction_en"]
            # a fact is a relation and a territory, which is asked for in three languages
            territory = re.search(r".*\b(?:of|in|includes|find) (.+?)(?: pay with| write| called|"
                                  r" follow)?\?$", question).group(1)
            words = [word for word in ("currency", "money", "language", "time") if word in question]
            relation = (words or ["region"])[0].replace("money", "currency")
            rows.append(((relation, territory), line))
            pairs.add((relation, territory))
    held = set(random.Random(0).sample(sorted(pairs), 100))
    fit, val = os.path.join(args.out, "fit.jsonl"), os.path.join(args.out, "val.jsonl")
    os.makedirs(args.out, exist_ok=True)
    for path, wanted in ((fit, False), (val, True)):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line for pair, line in rows if (pair in held) == wanted)
    print("| lr | epochs | zh | vi | ar | mean |\n| --- | --- | --- | --- | --- | --- |")
    for lr in ("5e-4", "1e-3", "2e-3"):
        for epochs in (2, 3, 4):
            out = os.path.join(args.out, "grid", f"{lr}-{epochs}")
            model = train(out, os.path.join(HERE, "model"), [
                "--method", "tft", "--lr", lr, "--epochs", str(epochs)], 0, fit)
            call("eval.py", "--model", model, "--data", val, "--out", f"{out}/scores.json")
            with open(f"{out}/scores.json", encoding="utf-8") as file:
                found = {result["lang"]: 100 * result["scores"]["exact_match"]["mean"]
                         for result in json.load(file)}
            cells = [f"{found[lang]:.0f}" for lang in LANGUAGES]
            mean = statistics.fmean(found.values())
            print("|", " | ".join([lr, str(epochs), *cells, f"{mean:.1f}"]), "|", flush=True)


def answer_loss(folder: str, data: str, side: str) -> float:
    """The mean loss of the answers' tokens in nats; side "target" or "english"."""
    sys.path.insert(0, ROOT)
    import torch
    from data import Tokenizer, make_records, read_parallel
    from dft import DFT, Method, lay_out
    from model import load
    model = load(folder)
    records, _ = make_records(read_parallel(data), Tokenizer(model.config), side, 512)
    total, count, method = 0.0, 0, Method("none", "none")
    with torch.no_grad():
        for first in range(0, len(records), 8):
            batch = lay_out(records[first:first + 8], method, model.config.num_hidden_layers)
            total += DFT(model, method)(batch)["tft"].item()
            count += batch.counts["tft"]
    return total / count


def real_row(args, method: str, out: str, fit: str, held: str) -> dict:
    """Train the model --real on `fit` with a method ("before": not at all), and score it."""
    result, i, j = args.real, "", ""
    os.makedirs(out, exist_ok=True)
    if method != "before":
        result = train(out, args.real, [*REAL, *METHODS[method][0]], 0, fit)
        with open(os.path.join(out, "settings.json"), encoding="utf-8") as file:
            settings = json.load(file)
        i, j = settings["lc_layer"], settings["et_layer"]
    row = {"method": method, "records": args.records, "i": i, "j": j,
           "loss": round(answer_loss(result, held, "target"), 4),
           "loss_en": round(answer_loss(result, held, "english"), 4)}
    if args.tests:
        path = os.path.join(out, "tests.json")
        call("eval.py", "--model", result, "--task", *args.tests, "--limit", args.limit,
             "--out", path)
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        for test in found if isinstance(found, list) else [found]:
            for metric, value in test["scores"].items():
                row[f"{test['task']}.{test['lang']} {metric}"] = (
                    f"{100 * value['mean']:.1f} ± {100 * value['stderr']:.1f}")
    return row


def real(args) -> None:
    """Train and score the model --real; one line of Markdown and of --csv for each run."""
    with open(args.data, encoding="utf-8") as file:
        lines = file.readlines()
    fit, held = os.path.join(args.out, "fit.jsonl"), os.path.join(args.out, "held.jsonl")
    os.makedirs(args.out, exist_ok=True)
    for path, chosen in ((fit, lines[:args.records]), (held, lines[-args.held:])):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(chosen)
    rows = []
    for method in ["before", *args.methods]:
        out = os.path.join(args.out, re.sub("[^a-z0-9.]+", "-", method).strip("-"))
        path = os.path.join(out, "row.json")
        if not os.path.exists(path):
            row = real_row(args, method, out, fit, held)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(row, file)
        with open(path, encoding="utf-8") as file:
            rows.append(json.load(file))
        if len(rows) == 1:
            print("|", " | ".join(rows[0]), "|\n" + "| --- " * len(rows[0]) + "|")
        print("|", " | ".join(map(str, rows[-1].values())), "|", flush=True)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def interval(values: list) -> str:
    """Mean and 95 % interval of its error, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.1f} ± {half:.1f}"


def tables(lines: list) -> None:
    """Print a Markdown table for each pretrained model: means over seeds, and the differences from
    tft with the same share of English, paired by seed."""
    columns = (*LANGUAGES, "mean", "en", "wrong_language", "p_english")
    for pretrained in dict.fromkeys(line["pretrained"] for line in lines):
        found = {}                              # {method: {seed: line}}
        for line in lines:
            if line["pretrained"] == pretrained:
                found.setdefault(line["method"], {})[line["seed"]] = line
        print(f"\nPretrained model: {pretrained}\n\n| method | seeds | zh | vi | ar | mean (sd) | "
              "mean - tft, 95 % | en | wrong language | p(English), layer 3 |\n" + "| --- " * 10
              + "|")
        for method, seeds in found.items():
            base = found.get("tft --english 0" if "--english 0" in method else "tft", {})
            values = {key: [float(line[key]) for line in seeds.values()] for key in columns}
            means = {key: f"{statistics.fmean(values[key]):.1f}" for key in columns}
            spread = f" ({statistics.stdev(values['mean']):.1f})" if len(seeds) > 1 else ""
            paired = [float(line["mean"]) - float(base[seed]["mean"])
                      for seed, line in seeds.items() if seed in base]
            difference = interval(paired) if paired and base is not seeds else ""
            cells = [method, len(seeds), means["zh"], means["vi"], means["ar"],
                     means["mean"] + spread, difference, means["en"], means["wrong_language"],
                     f"{statistics.fmean(values['p_english']):.2f}"]
            print("|", " | ".join(map(str, cells)), "|")
    print("\nDifference of two methods in the mean, 95 %, over all pretrained models and seeds:\n")
    means = {(line["pretrained"], line["method"], line["seed"]): float(line["mean"])
             for line in lines}
    for method, base in PAIRS:
        paired = [mean - means[pretrained, base, seed]
                  for (pretrained, name, seed), mean in means.items()
                  if name == method and (pretrained, base, seed) in means]
        if paired:
            print(f"- {method} minus {base}: {interval(paired)} ({len(paired)} pairs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS,
                        metavar="METHOD", help=f"some of: {', '.join(METHODS)}")
    parser.add_argument("--out", default="runs/study", help="folder for the runs")
    parser.add_argument("--second", metavar="DIR", help="another pretrained model (make_demo.py "
                        "--seed 1), on which tft, dft-logits and --lc none are run as well")
    parser.add_argument("--real", metavar="DIR", help="a model folder such as SmolLM2-135M")
    parser.add_argument("--data", metavar="FILE", help="parallel JSONL records for --real")
    parser.add_argument("--records", type=int, default=1000, help="how many to train on (1000)")
    parser.add_argument("--held", type=int, default=200, help="how many are held out (200)")
    parser.add_argument("--tests", nargs="*", default=[], metavar="TASK.LANG=FILE",
                        help="benchmarks of eval.py for --real")
    parser.add_argument("--limit", type=int, default=200, help="items of each benchmark (200)")
    parser.add_argument("--csv", default=os.path.join(HERE, "study_real.csv"),
                        help="where --real writes (default: demo/study_real.csv)")
    parser.add_argument("--grid", action="store_true", help="compare learning rates and epochs")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if args.grid:
        return grid(args)
    if args.real:
        return real(args)
    lines = []
    if not args.table:
        runs = [("demo", method, seed) for method in args.methods
                for seed in range(METHODS[method][1])]
        if args.second:
            runs += [("second", method, seed) for method in list(METHODS)[:3] for seed in range(3)]
        for pretrained, method, seed in runs:
            lines.append(run(args, pretrained, method, seed))
            print(lines[-1], file=sys.stderr)
        with open(CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    with open(CSV, newline="", encoding="utf-8") as file:
        tables(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
