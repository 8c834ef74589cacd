"""Kill a run at random moments, again and again, until it is done: is it the undisturbed run?

    python tests/soak.py                              20 kills of one process, about 6 minutes
    python tests/soak.py 2                            20 kills of two ranks under torchrun

Every other kill falls inside a save. A line is printed per kill, and last what was compared. The
exit code is 1 if a bit differs.
"""
import random
import sys
import tempfile
import time
from pathlib import Path

from runs import Run, bits, command, launch, metrics, numbers, write_data


def saving(out, since):
    """Whether a checkpoint is being written that was begun after a time."""
    partial = list((out / "checkpoints").glob("*.partial"))
    return any(path.stat().st_mtime > since for path in partial if path.exists())


def main(work, ranks=None, kills=20, seed=0):
    straight, soaked, data = work / "straight", work / "soaked", write_data(work / "data", 200)
    more = ["--steps", 20 * kills, "--batch_size", 16, "--save_every", 3]
    launch(command(straight, data, *more), ranks, seconds=3600)
    memory = [line["peak_mem_mib"] for line in metrics(straight)]
    print(f"undisturbed: peak memory {memory[19]} MiB after 20 steps, {memory[-1]} MiB at last")

    rng = random.Random(seed)
    for kill in range(1, kills + 1):
        began, in_save = time.time(), kill % 2 == 0
        moment = began + rng.uniform(1, 9)          # reading and loading included
        run = Run(command(soaked, data, *more), ranks)
        while run.process.poll() is None and (
                time.time() < moment or in_save and not saving(soaked, began)):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.05))
        where = "in a save" if saving(soaked, began) else "between saves"
        run.kill()
        if run.end() == 0:
            break                                   # the run was done before the kill
        lines = (soaked / "metrics.jsonl").read_bytes().count(b"\n") if soaked.exists() else 0
        print(f"kill {kill}: after {time.time() - began:.1f} s, {lines} steps, {where}")
    launch(command(soaked, data, *more), ranks, seconds=3600)
    last = f"checkpoints/step-{20 * kills:06d}"
    same = {"the numbers of every step": numbers(soaked) == numbers(straight),
            "weights and moments": bits(soaked / last) == bits(straight / last),
            "the exported model": bits(soaked / "model") == bits(straight / "model")}
    for what, equal in same.items():
        print(f"{'equal bit for bit' if equal else 'DIFFERENT'}: {what}")
    return all(same.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if main(Path(folder), *map(int, sys.argv[1:])) else 1)
