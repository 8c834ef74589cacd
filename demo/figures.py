"""figures.py: pictures of what eval.py --task lens wrote, of the losses of runs, and of the study.

    python eval.py --model BEFORE AFTER --task lens --data FILE --lang zh --out lens.json
    python demo/figures.py lens.json lens.png --layers 1 3
    python demo/figures.py runs/A/metrics.jsonl runs/B/metrics.jsonl losses.png
    python demo/figures.py demo/study.csv study.png

A lens picture has a row for each model, with the same axes in all rows: the entropy of the
next-token distribution that the head reads after each layer; the same for every token of one query;
and the probability of the English and of the target-language answer. Dotted lines mark layers i and
j: those given by --layers, else those that the lens of the first model suggests. A picture of the
study has a bar for each method: exact match, the mean of three languages over the seeds, with its
95 % interval and a dot for each seed; blue: without English records. Needs matplotlib.
"""
import argparse
import csv
import json
import os
import statistics
import sys

# Two colours and line styles that can be told apart without colour vision, and in print.
TARGET = dict(color="#D55E00", marker="o", linestyle="-", markersize=4)
ENGLISH = dict(color="#0072B2", marker="x", linestyle="--", markersize=5)
LINES = ["-", "--", ":", "-."]
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"]
# Student's t: the 97.5 % quantile for n - 1 degrees of freedom
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
NAMES = {"zh": "Chinese", "vi": "Vietnamese", "ar": "Arabic"}


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def short(path: str) -> str:
    """A model folder's name; runs/NAME/model is NAME."""
    parts = os.path.normpath(path).split(os.sep)
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


def mark(axes, i: int, j: int) -> None:
    """Dotted lines at layers i and j, with their names above the axes."""
    for layer in {i, j}:
        axes.axvline(layer, color="0.4", linestyle=":", linewidth=1.2)
    labels = [(i, "i"), (j, "j")] if i != j else [(i, "i = j")]
    for layer, label in labels:
        axes.annotate(label, (layer, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                      textcoords="offset points", ha="center", va="bottom")


def draw_lens(pyplot, models: list, trained: list | None):
    """A figure with one row for each model."""
    language = NAMES.get(models[0]["lang"], models[0]["lang"] or "target language")
    i, j = trained or (models[0]["i"], models[0]["j"])
    why = "trained" if trained else f"as the lens of {short(models[0]['model'])} suggests"
    figure = pyplot.figure(figsize=(13, 3.6 * len(models) + 0.4), layout="constrained")
    figure.suptitle(f"i = {i}, j = {j} ({why})", fontsize=10)
    rows = figure.subplots(len(models), 3, squeeze=False, sharex="col", sharey="col")
    top = max(max(map(max, model["map"])) for model in models)
    names = [short(model["model"]) for model in models]
    if len(set(names)) < len(names):
        names = [model["model"] for model in models]
    for name, model, (left, middle, right) in zip(names, models, rows):
        layers = range(len(model["entropy"]))
        left.plot(layers, model["entropy"], label=f"queries in {language}", **TARGET)
        left.plot(layers, model["entropy_en"], label="the same in English", **ENGLISH)
        left.set(title=f"entropy, {model['n']} records\n", ylabel=f"{name[:24]}\n\nentropy (nats)")
        image = middle.imshow(model["map"], aspect="auto", origin="lower", cmap="cividis", vmin=0,
                              vmax=top)
        figure.colorbar(image, ax=middle, label="entropy (nats)")
        middle.set(title=f"entropy, one query in {language}\n", ylabel="layer")
        for layer in {i, j}:
            middle.axhline(layer, color="white", linestyle=":", linewidth=1.2)
        if "p_target" in model:
            right.plot(layers, model["p_target"], label=f"answer in {language}", **TARGET)
            right.plot(layers, model["p_english"], label="answer in English", **ENGLISH)
        right.set(title=f"first token of the answer, {model['pivots']} records\n",
                  ylabel="probability")
        for axes in (left, right):
            mark(axes, i, j)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelbottom=True)
    for axes, label in zip(rows[-1], ("layer", "token of the query", "layer")):
        axes.set_xlabel(label)
    for axes in (rows[0][0], rows[0][2]):
        axes.set_ylim(bottom=0)                 # the rows below share it
        axes.legend()
    return figure


def smooth(values: list, width: int = 20) -> list:
    """Means over the last `width` values."""
    means = []
    for n in range(1, len(values) + 1):
        part = values[max(0, n - width):n]
        means.append(sum(part) / len(part))
    return means


def draw_losses(pyplot, runs: dict):
    """Losses over steps for {name: rows of metrics.jsonl}, one panel for each term."""
    terms = []
    for rows in runs.values():
        terms += [key for key in ("loss", "tft", "lc", "et") if key in rows[0] and key not in terms]
    figure = pyplot.figure(figsize=(3.6 * len(terms), 3.6), layout="constrained")
    for n, (term, axes) in enumerate(zip(terms, figure.subplots(1, len(terms), squeeze=False)[0])):
        for k, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[term]) for row in rows if row.get(term) is not None]
            if points:
                steps, values = zip(*points)
                axes.plot(steps, smooth(values), label=name, color=COLORS[k % len(COLORS)],
                          linestyle=LINES[k % len(LINES)])
            held = [(row["step"], row[f"val_{term}"]) for row in rows if f"val_{term}" in row]
            if held:
                axes.plot(*zip(*held), label=f"{name}, held out", color=COLORS[k % len(COLORS)],
                          marker="o", linestyle="none")
        axes.set(title=term, xlabel="step", ylabel="mean over 20 steps" if n == 0 else None)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure


def draw_study(pyplot, rows: list):
    """Bars of exact match by method, the mean of zh, vi and ar, for each pretrained model."""
    models = list(dict.fromkeys(row["pretrained"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = pyplot.figure(figsize=(8, 1 + 0.32 * len(methods)), layout="constrained")
    all_axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for model, axes in zip(models, all_axes):
        for n, method in enumerate(methods):
            values = [float(row["mean"]) for row in rows
                      if (row["pretrained"], row["method"]) == (model, method)]
            if values:
                color = ENGLISH["color"] if "english 0" in method else TARGET["color"]
                mean = statistics.fmean(values)
                axes.barh(n, mean, color=color, alpha=0.6)
                if len(values) > 1:
                    half = T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
                    axes.errorbar(mean, n, xerr=half, color="0.4", capsize=3)
                axes.plot(values, [n] * len(values), "k.", markersize=5)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(title=f"pretrained model: {model}", xlabel="exact match, mean of zh, vi, ar (%)")
    all_axes[0].invert_yaxis()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="one lens.json, the metrics.jsonl of one or several runs, or "
                        "study.csv; and then the picture to write, NAME.png (default: named "
                        "like the last)")
    parser.add_argument("--layers", nargs=2, type=int, metavar=("I", "J"),
                        help="the layers i and j that were trained, to be marked")
    args = parser.parse_args()
    *files, out = args.files
    if not out.endswith(".png"):
        files, out = args.files, os.path.splitext(out)[0] + ".png"
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        fail("figures.py draws with matplotlib: pip install matplotlib")
    try:
        runs, models, study = {}, [], []
        for path in files:
            with open(path, encoding="utf-8") as file:
                if path.endswith(".csv"):
                    study += csv.DictReader(file)
                elif path.endswith(".jsonl"):
                    runs[short(os.path.dirname(path) or ".")] = [json.loads(line) for line in file]
                else:
                    models += json.load(file)
        if study:
            figure = draw_study(pyplot, study)
        elif runs:
            figure = draw_losses(pyplot, runs)
        else:
            figure = draw_lens(pyplot, models, args.layers)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        fail(f"{' '.join(files)}: expected what eval.py --task lens --out wrote, metrics.jsonl of "
             f"a run, or study.csv ({type(error).__name__} {error})")
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        fail(f"{out}: {error.strerror}; expected a folder that can be written")
    print(f"The picture is {out}")


if __name__ == "__main__":
    main()
