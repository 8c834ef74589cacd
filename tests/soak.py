"""Kill a run at random moments, some of them inside a save, till it is done; is it the undisturbed run?

    python tests/soak.py                              20 kills of one process, about 6 minutes
    python tests/soak.py --ranks 2 --kills 20         the same with all ranks of two killed at once
    python tests/soak.py --long                       2,000 steps: is memory flat, is every line there?

It prints a line a kill and, last, what it compared; the exit code is 1 if a bit differs.
"""
import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from runs import ROOT, Run, command, launch, metrics, numbers
from safetensors.torch import load_file


def bits(folder):
    """{file: {name: bytes}} of the tensors of a folder."""
    return {path.name: {name: t.numpy().tobytes() for name, t in load_file(path).items()}
            for path in Path(folder).glob("*.safetensors")}


def soak(a, work):
    steps, every = 20 * a.kills, 3
    arguments = ["--steps", steps, "--batch_size", 16, "--save_every", every]
    ranks = a.ranks if a.ranks > 1 else None
    began = time.perf_counter()
    straight = launch(command(work / "straight", work / "data.jsonl", *arguments), ranks, seconds=600)
    assert straight.returncode == 0, straight.stderr
    alone = time.perf_counter() - began
    print(f"undisturbed: {steps} steps, a checkpoint every {every}, {alone:.0f} s")

    rng, out, inside, partials = random.Random(a.seed), work / "soaked", 0, out_partials(work / "soaked")
    for n in range(a.kills):
        before, began = partials(), time.perf_counter()
        run = Run(command(out, work / "data.jsonl", *arguments), ranks)
        if n % 2:                                           # inside a save, at a random one
            after = began + rng.uniform(4, 8)
            while run.process.poll() is None and (time.perf_counter() < after or not partials()):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.05))
        else:                                               # anywhere, reading and loading included
            time.sleep(rng.uniform(1, 9))
        ended = run.process.poll() is not None
        run.kill()
        left = [name for name in partials() if name not in before]
        inside += bool(left)
        run.end()
        done = len(metrics_up_to_a_torn_line(out))
        print(f"kill {n + 1:2}: after {time.perf_counter() - began:4.1f} s, {done:3} steps, "
              f"{'in a save: ' + left[0] if left else 'the run had ended' if ended else 'between saves'}")
        if ended:
            break
    last = launch(command(out, work / "data.jsonl", *arguments), ranks, seconds=600)
    assert last.returncode == 0, last.stderr
    final = f"checkpoints/step-{steps:06d}"
    same = {"losses, gradient norms and tokens of every step": numbers(out) == numbers(work / "straight"),
            "weights, AdamW's moments and generators": bits(out / final) == bits(work / "straight" / final),
            "the exported model": bits(out / "model") == bits(work / "straight" / "model")}
    for what, equal in same.items():
        print(f"{'equal bit for bit' if equal else 'DIFFERENT'}: {what}")
    print(f"{n + 1} kills of {a.ranks} rank{'s' * (a.ranks > 1)}, {inside} of them inside a save")
    return all(same.values())


def out_partials(out):
    """A function that lists unfinished checkpoints, cheaply."""
    folder = str(out / "checkpoints")

    def look():
        try:
            return [name for name in os.listdir(folder) if name.endswith(".partial")]
        except FileNotFoundError:
            return []
    return look


def metrics_up_to_a_torn_line(out):
    path = Path(out) / "metrics.jsonl"
    return [line for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def long(work):
    run = launch(command(work / "long", work / "data.jsonl", "--steps", 2000, "--batch_size", 1,
                         "--method", "dft-logits", "--save_every", 200), seconds=600)
    assert run.returncode == 0, run.stderr
    lines = metrics(work / "long")
    at = {n: lines[n - 1]["peak_mem_mib"] for n in (100, 300, 500, 1000, 2000)}
    print("peak memory, MiB, after so many steps:", at)
    print("lines of metrics.jsonl:", len(lines), "in order:", [x["step"] for x in lines] == list(range(1, 2001)))
    return at[2000] <= at[500] * 1.03 and len(lines) == 2000


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--long", action="store_true")
    a = p.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        lines = (ROOT / "demo" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:200]
        (work / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sys.exit(0 if (long(work) if a.long else soak(a, work)) else 1)
    finally:
        shutil.rmtree(work)
