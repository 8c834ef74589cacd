"""Short runs of train.py on the demo model, for the tests and for soak.py and two_nodes.py."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")


def command(out, data, *more):
    """The arguments of a run on a CPU, with fixed layers if the method has inner losses. Of equal
    options the last one counts."""
    more, layers = list(map(str, more)), ["--lc_layer", "1", "--et_layer", "3"]
    if {"tft", "sft", "qalign"} & set(more):
        layers = []
    elif "--lc" in more and more[more.index("--lc") + 1] == "none":
        layers = layers[2:]
    return ["--model", DEMO, "--data", str(data), "--out", str(out), "--device", "cpu", "--dtype",
            "fp32", "--lr", "1e-4", *layers, *more]


def write_data(path, count):
    """A file of the first records of the demo."""
    lines = (ROOT / "demo" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join(lines[:count]), encoding="utf-8")
    return str(path)


def metrics(out):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def numbers(out):
    """The same without times and memory, in which two equal runs may differ."""
    lines = metrics(out)
    for line in lines:
        for key in ("tokens_per_s", "seconds", "peak_mem_mib"):
            del line[key]
    return lines


def tensors(folder):
    """{name: tensor} of a model or a checkpoint; the rows that several ranks wrote are joined."""
    parts = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def bits(folder):
    """{name: bytes} of the same."""
    return {name: tensor.numpy().tobytes() for name, tensor in tensors(folder).items()}


def assert_close_runs(a, b):
    """Two runs that add the same numbers in another order, in two ranks or in smaller parts, say.

    fp32 rounds to 2^-24 = 6e-8. Over a thousand tokens and six layers rounding errors add up, as
    a random walk does, to about 1e-5 of a gradient. Losses are means, in which they cancel.
    Adam's first moment is a mean of gradients: we allow 1e-4 of the largest entry of a tensor.
    Adam moves each weight by about lr, however small its gradient. If that is all rounding error
    its direction is chance, so two weights may differ by 2 lr per step. Such weights are few: for
    gradients like a bell curve of width s with errors of size d, the squared distance is some
    3 d/s of the squared way that the weights moved. d/s = 1e-5 makes the distance 0.5 % of the
    way: we allow 1 %. (Without AVX, as another CPU would round, we saw 7e-6 and 0.01 %.)
    """
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["step"] == y["step"] and abs(x["tokens"] - y["tokens"]) <= 2   # idle ranks: 1 each
        for key in ("loss", "tft", "lc", "et", "grad_norm"):
            assert abs((x[key] or 0) - (y[key] or 0)) <= 1e-5 * (x[key] or 0), (x["step"], key)
    last = f"checkpoints/step-{len(metrics(a)):06d}"
    x, y, start = tensors(a / last), tensors(b / last), tensors(DEMO)
    distance = way = 0
    for name in x:
        if name.endswith("exp_avg"):
            assert (x[name] - y[name]).abs().max() <= 1e-4 * x[name].abs().max(), name
        elif not name.endswith("exp_avg_sq"):
            distance += (x[name] - y[name]).norm() ** 2
            way += (x[name] - start[name]).norm() ** 2
    assert 0 < way and distance ** 0.5 <= 0.01 * way ** 0.5


class Run:
    """A process as a user starts it, with `ranks` under torchrun. It is killed after `seconds`."""

    def __init__(self, arguments, ranks=None, torchrun=("--standalone",), seconds=150,
                 program=ROOT / "train.py"):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, *torchrun]
        words = [sys.executable, *(launcher if ranks else []), program, *arguments]
        self.process = subprocess.Popen(
            list(map(str, words)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        self.pid, self.output = self.process.pid, ""
        self.timer = threading.Timer(seconds, self.kill)
        self.timer.start()

    def until(self, text):
        """Read what it prints up to a line with this text."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return self
        raise AssertionError(f"{text!r} was never printed: {self.output}")

    def ranks(self):
        """{rank: its process} under torchrun, which gives each a session of its own."""
        pids = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):    # it just ended
                for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if word.startswith(b"RANK="):
                        pids[int(word[5:])] = int(pid)
        return pids

    def kill(self):
        """kill -9 for it and its ranks."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for pid in [self.pid, *self.ranks().values()]:
                os.kill(pid, signal.SIGKILL)

    def end(self):
        """Wait for its end and return its exit code."""
        self.output += self.process.stdout.read()
        self.timer.cancel()
        return self.process.wait()


def launch(arguments, ranks=None, **more):
    """A run that must succeed. For several, one after another in the same ranks (torchrun takes
    seconds to start): launch([json.dumps([command, ...])], ranks, program=runs.__file__)."""
    run = Run(arguments, ranks, **more)
    assert run.end() == 0, run.output


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *args: dist.barrier()
    for arguments in json.loads(sys.argv[1]):
        train.main(arguments)
