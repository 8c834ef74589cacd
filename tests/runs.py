"""Runs of train.py as tests need them: short ones on the demo model."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")
CLOCK = ("tokens_per_s", "seconds", "peak_mem_mib")         # what two equal runs may differ in


def command(out, data, *more):
    """The arguments of a run with the layers fixed."""
    return ["--model", DEMO, "--data", str(data), "--out", str(out), "--device", "cpu", "--dtype", "fp32",
            "--lc_layer", "1", "--et_layer", "3", "--lr", "1e-4", *map(str, more)]


def metrics(out):
    """The lines of metrics.jsonl; fails on a torn one."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def numbers(out):
    """The same without what the clock says."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in metrics(out)]


class Run:
    """train.py as a user starts it, with `ranks` under torchrun. It dies with its children after `seconds`."""

    def __init__(self, arguments, ranks=None, torchrun=(), seconds=120):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                    *(torchrun or ["--standalone"])] if ranks else []
        self.err = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)], text=True,
            stdout=subprocess.PIPE, stderr=self.err,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        self.pid, self.stdout = self.process.pid, ""
        self.timer = threading.Timer(seconds, self.kill)
        self.timer.start()

    def until(self, text):
        """Read what it prints till a line with this text."""
        for line in self.process.stdout:
            self.stdout += line
            if text in line:
                return self
        raise AssertionError(f"{text!r} was never printed: {self.stdout}\n{self.end().stderr}")

    def children(self):
        """The processes of the ranks; torchrun gives each a session of its own."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
            return [int(child) for child in file.read().split()]

    def kill(self):
        """kill -9 for it and its children."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for pid in [self.pid, *self.children()]:
                os.kill(pid, signal.SIGKILL)

    def pid_of(self, rank):
        """The process of a rank under torchrun."""
        for child in self.children():
            with open(f"/proc/{child}/environ", "rb") as file:
                if f"RANK={rank}".encode() in file.read().split(b"\0"):
                    return child
        raise AssertionError(f"no rank {rank} among {self.children()}")

    def end(self):
        """Wait for it; then returncode, stdout and stderr are there."""
        self.stdout += self.process.stdout.read()
        self.returncode = self.process.wait()
        self.timer.cancel()
        self.err.seek(0)
        self.stderr = self.err.read()
        return self


def launch(arguments, ranks=None, torchrun=(), seconds=120):
    """A run from its beginning to its end."""
    return Run(arguments, ranks, torchrun, seconds).end()
