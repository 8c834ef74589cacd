"""Checks and timings on one GPU, in at most eight minutes.

    python tests/gpu.py --out gpu.json                  one NVIDIA GPU
    python tests/gpu.py --device cpu --tiny             only shows that this script works

Prints a table, writes it as JSON, and exits with 1 if a part failed or did not finish in time. The
first parts run side by side, each in its own process; those that measure time follow one by one:

    tests           the tests of test_fast.py that need a GPU
    losses:FAMILY   for a tiny llama2, llama3 or gemma2-mild: loss and gradient on the device
                    against a CPU in fp32, three methods, two dtypes, plain and compiled: the
                    norm of the difference divided by the norm on the CPU
    recompilations  graphs that are compiled after the fourth of 20 steps with records of different
                    lengths
    resume          torchrun with one rank, killed after a checkpoint and started again, against an
                    undisturbed run: the largest relative difference of a loss
    demo            `python train.py`, the demo with its questions
    speed           tests/bench.py: tokens of prompts and answers per second of a whole step, their
                    FLOPs over the peak of an H100 (MFU), memory; compiled and plain, transformers,
                    transformers with Liger
    decoding        new tokens per second of generate(): 32 prompts, read one by one, then up to 64
                    tokens for each in a batch
"""
import argparse
import json
import os
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
from test_dft import gradients, make_records, objective
from test_dft import ours as sums_and_counts
from torch._dynamo.utils import counters

import train
from dft import DFT, Method
from model import DTYPES, generate, load, pick_device

TESTS = Path(__file__).parent
PEAK = 989e12               # FLOP/s of an H100 in bf16
# Of the relative distances of a loss or a gradient; a wrong mask, index or factor gives about 1.
BOUNDS = {"fp32": 1e-3, "bf16": 0.2}
METHODS = {"tft": Method("none", "none"), "dft-logits": Method("logits", "logits", 1, 3),
           "dft-feature": Method("feature", "feature", 1, 3)}
FAMILIES = ("llama2", "llama3", "gemma2-mild")


# --------------------------------------------------------------------------------- correctness

def tests(args):
    if args.device == "cpu":
        yield "test_fast.py", "not run: needs a GPU"
        return
    command = [sys.executable, "-m", "pytest", TESTS / "test_fast.py", "-k", "on_a_gpu_compiled",
               "-q", "-rs"]
    done = subprocess.run(command, capture_output=True, text=True)
    yield "test_fast.py", done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-3000:]


def losses(args, family):
    with tempfile.TemporaryDirectory() as folder:
        random_model(family).save_pretrained(folder)
        for name, method in METHODS.items():
            for dtype in ("fp32", "bf16"):
                for compiled in (False,) if args.tiny else (False, True):
                    what = f"{family} {name} {dtype} {'compiled' if compiled else 'plain'}"
                    try:
                        found = distances(folder, method, dtype, compiled, args)
                        failed = "FAILED: "                     # also for NaN
                        if found[0] < BOUNDS[dtype] and found[1] < BOUNDS[dtype]:
                            failed = ""
                        yield what, failed + "loss {:.1e}, gradient {:.1e}".format(*found)
                    except Exception as error:      # the others are worth knowing
                        traceback.print_exc()
                        yield what, f"FAILED: {type(error).__name__}: {str(error)[:300]}"


def distances(folder, method, dtype, compiled, args):
    """(of the loss, of the gradient), each relative to those of a CPU in fp32."""
    slow, fast = DFT(load(folder), method), DFT(load(folder, device=args.device), method)
    fast.model.compute_dtype = DTYPES[dtype]
    if compiled:
        fast.compile_parts(flex=True)
    values, flat = [], []
    for model in (slow, fast):
        loss = objective(sums_and_counts(model, make_records()))
        grads = gradients(model, loss)
        values.append(loss.item())
        flat.append(torch.cat([grads[key].float().cpu().flatten() for key in sorted(grads)]))
    apart = (flat[1] - flat[0]).norm() / flat[0].norm()
    return abs(values[1] / values[0] - 1), apart.item()


def recompilations(args):
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model("tiny", None, folder)
        for name in METHODS:
            settings = bench_settings(args, folder, name, 4, "no" if args.tiny else "yes")
            *given, records = bench.prepare(settings)
            step = bench.ours(*given, records)[1]
            graphs, size = [], max(1, len(records) // 20)
            before = counters["stats"]["unique_graphs"]         # of the methods before this one
            for first in range(0, 20 * size, size):
                step(records[first:first + size])
                graphs.append(counters["stats"]["unique_graphs"] - before)
            failed = f"FAILED: {graphs}: " if graphs[-1] > graphs[3] else ""
            yield name, f"{failed}{graphs[-1] - graphs[3]} after step 4, {graphs[3]} until then"


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
        apart = []
        for a, b in zip(metrics(folder / "undisturbed"), metrics(folder / "killed"), strict=True):
            apart.append(abs(a["loss"] - b["loss"]) / a["loss"])
        yield "6 steps, killed after 4", f"{max(apart):.1e}"
        # CUDA adds some gradients in an order that changes from run to run
        bound = 0.0 if args.device == "cpu" else 1e-3
        assert all(distance <= bound for distance in apart), apart


def demo(args):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(["--out", Path(folder) / "run", "--device", args.device,
                   *(["--steps", 2] if args.tiny else [])], seconds=60 * args.minutes)
        assert run.end() == 0, run.output[-3000:]
        steps = metrics(Path(folder) / "run")
        yield f"loss at step {len(steps)}", f"{steps[-1]['loss']:.4f}"
        for line in run.output.splitlines():
            if "exact_match" in line:
                what, items, before, after = line.strip("| ").split(" | ")
                yield what, f"before {before}, after {after}, {items} items"


# ---------------------------------------------------------------------------------------- speed

def bench_settings(args, folder, method, layers, compiled, **more):
    """The options of bench.py, with i and j at 2/32 and 15/32 of the layers, as in the paper."""
    values = dict(model=folder, data=bench.RANDOM, method=method, dtype="bf16", device=args.device,
                  lc_layer=max(1, round(layers * 2 / 32)), et_layer=round(layers * 15 / 32),
                  compile=compiled, micro_batch_tokens=4096, peer_batch=8,
                  records=20 if args.tiny else 320)
    return argparse.Namespace(**{**values, **more})


# One side of bench.py each: its name, compiled or not, METHOD:SIZE with tokens of a micro-batch or,
# for a peer, records of a batch. The most telling come first, in case that time runs out.
SIDES = [("ours", "yes", "tft:4096,tft:8192,dft-logits:8192,dft-feature:8192"),
         ("liger", "no", "tft:8,tft:16"), ("transformers", "no", "tft:8"),
         ("ours", "no", "tft:8192"), ("transformers", "no", "dft-logits:8")]
TINY_SIDES = [("ours", "no", "tft:256,dft-logits:256"), ("transformers", "no", "tft:8")]


def speed(args):
    # 18 bytes per parameter (weight, gradient and two moments in fp32, a copy of the weight in
    # bf16) are 48 GB for 12 layers of LLaMA-2-7B and 47 GB for all 26 of Gemma-2-2B
    shapes = {"tiny": 4} if args.tiny else {"llama-2-7b": 12, "gemma-2-2b": 26}
    with tempfile.TemporaryDirectory() as folder:
        for shape, layers in shapes.items():
            os.mkdir(f"{folder}/{shape}")
            bench.random_model(shape, layers, f"{folder}/{shape}", device=args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()            # the sides need all of the memory
        for side, compiled, cases in TINY_SIDES if args.tiny else SIDES:
            for shape, layers in shapes.items():
                settings = bench_settings(args, f"{folder}/{shape}", "tft", layers, compiled,
                                          records=8 if args.tiny else 128)
                what = f"{shape}, {layers} layers, {side}{', compiled' * (compiled == 'yes')}"
                yield from run_side(args, settings, side, cases, shape, layers, what)


def run_side(args, settings, side, cases, shape, layers, what):
    """Run one side of bench.py in a process; yields a row for each case and one for the process."""
    command = [sys.executable, TESTS / "bench.py", "--side", side, "--cases", cases,
               *bench.flags(settings, (*bench.SETTINGS, "records", "peer_batch"))]
    if side == "ours" and args.profile:
        command += ["--profile", f"{args.profile}-{shape}-{settings.compile}"]
    began, tail = time.monotonic(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        tail = [*tail[-30:], line]
        if not line.startswith('{"case"'):
            continue
        found = json.loads(line)
        D, M, _, H, K, h, V = bench.SHAPES[shape]
        layer = D * h * (2 * H + 2 * K) + 3 * D * M
        flops = 6 * (layers * layer * found["tokens"] + D * V * found["answer_tokens"])
        mfu = f"MFU {100 * flops / found['seconds'] / PEAK:.1f} %, "
        if not found["case"].startswith("tft"):         # the FLOPs of inner losses are not counted
            mfu = ""
        yield f"{what}, {found['case']}", (
            f"{found['tokens'] / found['seconds']:,.0f} tokens/s, {mfu}{found['mib']:,.0f} MiB, "
            f"first step {found['first']:.0f} s, loss {sum(found['losses'].values()):.4f}")
    code = process.wait()
    yield what, f"{time.monotonic() - began:.0f} s in all, exit code {code}"
    if code:
        print(*tail, sep="", file=sys.stderr)
        assert side != "ours", what             # a peer may be missing or run out of memory


def decoding(args):
    shape, layers, new = ("tiny", 4, 4) if args.tiny else ("gemma-2-2b", 26, 64)
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(shape, layers, folder, device=args.device)
        model = load(folder, torch.bfloat16, args.device)
        prompts = [record.prompt for record in bench.random_records(32, model.config.vocab_size)]
        generate(model, prompts, 2)
        began = time.perf_counter()
        count = sum(map(len, generate(model, prompts, new)))
        yield f"{shape}, 32 prompts", f"{count / (time.perf_counter() - began):,.0f} tokens/s"


# ----------------------------------------------------------------------------------------- main

PARTS = dict(tests=tests, losses=losses, recompilations=recompilations, resume=resume, demo=demo,
             speed=speed, decoding=decoding)
SIDE_BY_SIDE = ["tests", *(f"losses:{family}" for family in FAMILIES), "recompilations", "resume",
                "demo"]
ONE_BY_ONE = ["speed", "decoding"]


def run_part(args):
    """Run one part in this process and print its rows as JSON lines."""
    name, *more = args.part.split(":")
    began = time.monotonic()

    def show(what, result):
        print(json.dumps([args.part, what, result]), flush=True)
        print(args.part, what, result, sep=" | ", file=sys.stderr, flush=True)

    try:
        pick_device(args.device)                # sets the options of torch that users get
        for row in PARTS[name](args, *more):
            show(*row)
    except Exception as error:
        show(name, f"FAILED: {type(error).__name__}: {str(error)[:1000]}")
        traceback.print_exc()
        sys.exit(1)
    finally:
        show("seconds", f"{time.monotonic() - began:.0f}")


def start_part(part):
    """The process that runs the part, and the file of its rows, which remain if it is killed."""
    output = tempfile.TemporaryFile("w+")
    return output, subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", part],
                                    stdout=output)


def finish_part(part, output, process, deadline):
    """Wait for a part until the deadline; its rows."""
    late = []
    try:
        code = process.wait(max(1, deadline - time.monotonic()))
        if code:
            late = [[part, "exit code", f"FAILED: {code}"]]
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-9", "-P", str(process.pid)])        # its direct children
        process.kill()
        late = [[part, "the rest", "FAILED: out of time"]]
    output.seek(0)
    return [json.loads(line) for line in output if line.startswith('["')] + late


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing compiled")
    parser.add_argument("--minutes", type=float, default=8, help="end after this time")
    parser.add_argument("--parts", default=",".join(SIDE_BY_SIDE + ONE_BY_ONE),
                        help="parts to run, such as tests,losses:llama2 (default: all)")
    parser.add_argument("--profile", help="profile a step of each of our sides, to FILE-...txt")
    parser.add_argument("--out", default="gpu.json", help="the table as JSON")
    parser.add_argument("--part", help="run one part in this process")
    args = parser.parse_args()
    if args.part:
        return run_part(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU; use --device cpu --tiny")
    deadline, rows = time.monotonic() + 60 * args.minutes, []
    parts = args.parts.split(",")
    known = SIDE_BY_SIDE + ONE_BY_ONE
    for part in parts:
        if part not in known:
            parser.error(f"no part {part!r}; expected some of {', '.join(known)}")
    if not os.path.isdir(os.path.dirname(args.out) or ".") or os.path.isdir(args.out):
        parser.error(f"--out {args.out}: expected a file in an existing folder")
    started = {part: start_part(part) for part in parts if part in SIDE_BY_SIDE}
    for part, started_part in started.items():
        rows += finish_part(part, *started_part, deadline)
    for part in parts:
        if part in ONE_BY_ONE:
            rows += finish_part(part, *start_part(part), deadline)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump({"device": device, "torch": torch.__version__, "rows": rows}, file, indent=1)
    print(f"\n{device}, torch {torch.__version__}\n\n| part | what | result |\n| --- | --- | --- |")
    for row in rows:
        print("|", " | ".join(row), "|")
    sys.exit(any("FAILED" in result for *_, result in rows))


if __name__ == "__main__":
    main()
