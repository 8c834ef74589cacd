"""Everything about the GPU path that is worth knowing, in one run of at most eight minutes.

    python tests/gpu.py --out gpu.json                  one NVIDIA GPU
    python tests/gpu.py --device cpu --tiny             only shows that this script works

Prints a table, writes it as JSON, and exits with 1 if a part failed. The parts:

    tests           the tests of test_fast.py that need a GPU
    losses          loss and gradient on the device against a CPU in fp32, for three families, three
                    methods, two dtypes, plain and compiled: the distance divided by the length
    recompilations  graphs that are compiled after 4 steps of 20, for records of all lengths
    resume          torchrun with one rank, killed after a checkpoint and started again, against an
                    undisturbed run: the largest relative difference of a loss
    speed           tests/bench.py: tokens/s of one step, FLOPs of the real tokens over the peak of
                    an H100 (MFU), memory; compiled and plain, transformers, transformers with Liger
    decoding        new tokens per second, greedy, 32 prompts in a batch
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import bench
import torch
from conftest import random_model
from runs import Run, launch, metrics, write_data
from test_dft import gradients, make_records, objective, ours
from torch._dynamo.utils import counters

import train
from dft import DFT, Method
from model import DTYPES, generate, load

TESTS = Path(__file__).parent
PEAK = 989e12               # FLOP/s of an H100 in bf16
BOUNDS = {"fp32": 1e-3, "bf16": 0.2}    # of a gradient; a wrong mask, index or factor gives about 1
METHODS = {"tft": Method("none", "none"), "dft-logits": Method("logits", "logits", 1, 3),
           "dft-feature": Method("feature", "feature", 1, 3)}


def tests(args):
    if args.device == "cpu":
        yield "test_fast.py", "not run: needs a GPU"
        return
    command = [sys.executable, "-m", "pytest", TESTS / "test_fast.py", "-k", "gpu", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    yield "test_fast.py -k gpu", done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-2000:]


def losses(args):
    for family in ("llama2", "llama3", "gemma2-mild"):
        with tempfile.TemporaryDirectory() as folder:
            random_model(family).save_pretrained(folder)
            for name, method in METHODS.items():
                for dtype in ("fp32", "bf16"):
                    for compiled in (False,) if args.tiny else (False, True):
                        what = f"{family} {name} {dtype} {'compiled' if compiled else 'plain'}"
                        found = distances(folder, method, dtype, compiled, args)
                        yield what, "loss {:.1e}, gradient {:.1e}".format(*found)
                        assert max(found) < BOUNDS[dtype], f"{what}: expected < {BOUNDS[dtype]}"


def distances(folder, method, dtype, compiled, args):
    """(of the loss, of the gradient), each relative to those of a CPU in fp32."""
    slow, fast = DFT(load(folder), method), DFT(load(folder, device=args.device), method)
    fast.model.compute_dtype = DTYPES[dtype]
    if compiled:
        fast.compile_parts(flex=True)
    values, flat = [], []
    for model in (slow, fast):
        loss = objective(ours(model, make_records()))
        grads = gradients(model, loss)
        values.append(loss.item())
        flat.append(torch.cat([grads[key].float().cpu().flatten() for key in sorted(grads)]))
    apart = (flat[1] - flat[0]).norm() / flat[0].norm()
    return abs(values[1] / values[0] - 1), apart.item()


def recompilations(args):
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model("tiny", None, folder)
        for name in METHODS:
            settings = bench_settings(args, folder, name, "no" if args.tiny else "yes")
            *given, records = bench.prepare(settings)
            _, step = bench.ours(*given, records)
            graphs, size = [], max(1, len(records) // 20)
            for first in range(0, 20 * size, size):
                step(records[first:first + size])
                graphs.append(counters["stats"]["unique_graphs"])
            yield name, f"{graphs[-1] - graphs[3]} after step 4, {graphs[3]} graphs until then"
            assert graphs[-1] == graphs[3], f"{name}: {graphs}"


def bench_settings(args, folder, method, compiled, **more):
    """The command line of bench.py."""
    values = dict(model=folder, data=bench.RANDOM, method=method, dtype="bf16", device=args.device,
                  lc_layer=2, et_layer=3, compile=compiled, micro_batch_tokens=4096, peer_batch=8,
                  records=20 if args.tiny else 320)
    return argparse.Namespace(**{**values, **more})


def resume(args):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data.jsonl", 40)

        def words(out):
            return ["--model", train.DEMO["model"], "--data", data, "--out", folder / out,
                    "--device", args.device, "--dtype", "fp32", "--steps", 6, "--batch_size", 8,
                    "--save_every", 2, "--lr", "1e-4"]

        launch(words("undisturbed"), ranks=1)
        killed = Run(words("killed"), ranks=1).until("step-000004")
        killed.kill()
        killed.end()
        launch(words("killed"), ranks=1)
        apart = 0.0
        for a, b in zip(metrics(folder / "undisturbed"), metrics(folder / "killed"), strict=True):
            apart = max(apart, abs(a["loss"] - b["loss"]) / a["loss"])
        yield "6 steps, killed after 4", f"{apart:.1e}"
        # CUDA adds some gradients in an order that changes from run to run
        assert apart <= (0.0 if args.device == "cpu" else 1e-3)


def speed(args):
    # Enough layers for 18 bytes per parameter in two thirds of 80 GB
    shapes = {"tiny": 4} if args.tiny else {"llama-2-7b": 12, "gemma-2-2b": 26}
    for shape, layers in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            bench.random_model(shape, layers, folder)
            for method in ("dft-logits",) if args.tiny else ("tft", "dft-logits", "dft-feature"):
                sides = [("ours", "no"), ("transformers", "no")]
                if not args.tiny:
                    sides = [("ours", "yes"), *sides] + [("liger", "no")] * (method == "tft")
                for side, compiled in sides:
                    what = f"{shape}, {layers} layers, {method}, {side}"
                    what += ", compiled" * (compiled == "yes")
                    if time.monotonic() > args.deadline:
                        yield what, "not run: out of time"
                        continue
                    yield what, one_speed(args, folder, shape, layers, method, side, compiled)


def one_speed(args, folder, shape, layers, method, side, compiled):
    """The figures of one side of bench.py, as text."""
    settings = bench_settings(args, folder, method, compiled, records=8 if args.tiny else 64)
    try:
        found = bench.figures(settings, side)
    except subprocess.CalledProcessError as error:
        assert side != "ours", error            # a peer may be missing or run out of memory
        return f"failed with exit code {error.returncode}"
    D, M, _, H, K, h, V = bench.SHAPES[shape]
    layer = D * h * (2 * H + 2 * K) + 3 * D * M
    mfu = 6 * layers * layer * found["real"] / found["seconds"] / PEAK
    return (f"{found['real'] / found['seconds']:,.0f} tokens/s, MFU of the layers "
            f"{100 * mfu:.1f} %, {found['mib']:,.0f} MiB")


def decoding(args):
    shape, layers, new = ("tiny", 4, 4) if args.tiny else ("gemma-2-2b", 26, 64)
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(shape, layers, folder)
        model = load(folder, torch.bfloat16, args.device)
        prompts = [record.prompt for record in bench.random_records(32, model.config.vocab_size)]
        generate(model, prompts, 2)
        began = time.perf_counter()
        count = sum(map(len, generate(model, prompts, new)))
        yield f"{shape}, 32 prompts", f"{count / (time.perf_counter() - began):,.0f} tokens/s"


PARTS = (tests, losses, recompilations, resume, speed, decoding)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing compiled")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after this time")
    parser.add_argument("--out", default="gpu.json", help="the table as JSON")
    args = parser.parse_args()
    args.deadline = time.monotonic() + 60 * args.minutes
    rows, failed = [], False
    for part in PARTS:
        began = time.monotonic()
        try:
            if began > args.deadline:
                rows.append((part.__name__, "all", "not run: out of time"))
                continue
            for what, result in part(args):
                rows.append((part.__name__, what, result))
                print(*rows[-1], sep=" | ", flush=True)
        except Exception as error:
            failed = True
            rows.append((part.__name__, "FAILED", f"{type(error).__name__}: {error}"[:300]))
            traceback.print_exc()
        rows.append((part.__name__, "seconds", f"{time.monotonic() - began:.0f}"))
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump({"device": device, "torch": torch.__version__, "rows": rows}, file, indent=1)
    print(f"\n{device}, torch {torch.__version__}\n\n| part | what | result |\n| --- | --- | --- |")
    for row in rows:
        print("|", " | ".join(row), "|")
    sys.exit(failed)


if __name__ == "__main__":
    main()
