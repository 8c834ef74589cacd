"""table.py: the demo with each method, several seeds, as one table.

    python demo/table.py                        21 runs, about 40 minutes on 2 CPU cores
    python demo/table.py --seeds 1 --methods tft dft-logits

Each run is `python train.py` with the switches below and its report kept in OUT; a run whose report is
there already is not repeated. Cells are exact match in percent after training, the mean over seeds
and in brackets the lowest and the highest.
"""
import argparse
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TRAIN = os.path.join(HERE, "..", "train.py")
METHODS = {
    "tft": ["--method", "tft"],
    "dft-logits": [],
    "--lc none": ["--lc", "none"],
    "--lc feature": ["--lc", "feature"],
    "dft-feature": ["--method", "dft-feature"],
    "--align position": ["--align", "position"],
    "qalign, then sft": ["--method", "qalign"],
}
LANGUAGES = ("zh", "vi", "ar", "en")


def run(out: str, switches: list) -> str:
    """The report of a run of train.py, from OUT/report.txt if it is there."""
    path = os.path.join(out, "report.txt")
    if not os.path.exists(path):
        done = subprocess.run([sys.executable, TRAIN, "--out", out, *switches], check=True,
                              stdout=subprocess.PIPE, text=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(done.stdout)
    with open(path, encoding="utf-8") as file:
        return file.read()


def scores(report: str) -> dict:
    """{language: exact match after training, in percent} of a report."""
    found = {}
    for line in report.split("\n"):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0][:2] in LANGUAGES and re.fullmatch(r"[\d.]+%", cells[-1]):
            found[cells[0][:2]] = float(cells[-2].rstrip("%"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", default="runs/table", help="folder for the runs")
    args = parser.parse_args()
    rows = []
    for method in args.methods:
        results = []
        for seed in range(args.seeds):
            out = os.path.join(args.out, f"{re.sub('[^a-z]+', '-', method).strip('-')}-{seed}")
            report = run(out, ["--seed", str(seed), *METHODS[method]])
            if method.startswith("qalign"):         # the second stage starts from the first
                data = os.path.join(HERE, "train.jsonl"), os.path.join(HERE, "test.jsonl")
                report = run(out + "-sft", [
                    "--model", os.path.join(out, "model"), "--method", "sft", "--seed", str(seed),
                    "--data", data[0], "--test", data[1], "--dtype", "fp32", "--batch_size", "32",
                    "--lr", "5e-4", "--epochs", "3"])
            results.append(scores(report))
        cells = [method]
        for languages in (*((lang,) for lang in LANGUAGES), ("zh", "vi", "ar")):
            means = [sum(result[lang] for lang in languages) / len(languages) for result in results]
            mean = sum(means) / len(means)
            cells.append(f"{mean:.1f} ({min(means):.0f}-{max(means):.0f})")
        rows.append(cells)
        print(f"done: {' | '.join(cells)}", file=sys.stderr)
    for cells in (["method", *LANGUAGES, "mean of zh, vi, ar"], ["---"] * 6, *rows):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
