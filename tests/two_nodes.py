"""Two torchrun agents of two ranks each, on loopback addresses, stand in for two machines.

    python tests/two_nodes.py

Weights are sharded within a "machine" and replicated across them (--replicas 2). (1) Four ranks compute what
one process computes. (2) One rank of the second machine is killed: both agents start their ranks again, and
the finished run is the undisturbed one, bit for bit.
"""
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from runs import ROOT, Run, command, launch, metrics, numbers
from safetensors.torch import load_file


def agents(arguments):
    """A Run for each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Run(arguments, 2, ["--nnodes", "2", "--node_rank", str(node), "--rdzv_backend", "c10d",
                               "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", f"127.0.0.{node + 1}",
                               "--max-restarts", "3"]) for node in (0, 1)]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def main(work):
    lines = (ROOT / "demo" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:100]
    (work / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    asked = ["--steps", 30, "--batch_size", 20, "--save_every", 5]

    def arguments(name, *more):
        return command(work / name, work / "data.jsonl", *asked, *more)

    one = launch(arguments("one"))
    both = [node.end() for node in agents(arguments("four", "--replicas", 2))]
    for run in (one, *both):
        assert run.returncode == 0, run.stderr
    apart = max(abs(a[key] - b[key]) / abs(a[key]) for key in ("loss", "tft", "lc", "et", "grad_norm")
                for a, b in zip(metrics(work / "one"), metrics(work / "four"), strict=True))
    a, b = weights(work / "one"), weights(work / "four")
    print(f"4 ranks on 2 machines against 1 process, 30 steps: losses and gradient norms differ by {apart:.1e} "
          f"relative, weights by {max((a[k] - b[k]).abs().max().item() for k in a):.1e} at most")

    nodes = agents(arguments("killed", "--replicas", 2))
    while not list(work.glob("killed/checkpoints/step-??????")):
        time.sleep(0.1)
    os.kill(nodes[1].children()[0], signal.SIGKILL)
    for node in nodes:
        assert node.end().returncode == 0, node.stderr
    b = weights(work / "killed")
    same = numbers(work / "four") == numbers(work / "killed") and all(
        x.equal(b[key]) for key, x in weights(work / "four").items())
    said = (nodes[0].stdout + nodes[1].stdout).splitlines()
    resumed = next(line for line in said if line.startswith("resume    from"))
    print(f"one rank killed, both machines went on ({resumed.split(', ')[1]}): "
          + ("equal bit for bit" if same else "DIFFERENT"))
    return apart < 1e-5 and same


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp())
    try:
        sys.exit(0 if main(work) else 1)
    finally:
        shutil.rmtree(work)
