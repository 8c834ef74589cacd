"""Two torchrun agents with two ranks each, on loopback addresses, stand in for two machines.

    python tests/two_nodes.py

The weights are sharded over the four ranks. (1) They compute what one process computes. (2) One
rank of the second machine is killed: both agents start their ranks again, and the finished run is
the undisturbed one, bit for bit.
"""
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

from runs import Run, assert_close_runs, bits, command, launch, numbers, write_data


def start(arguments):
    """A Run for each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Run(arguments, 2, ["--nnodes", "2", "--node_rank", str(node), "--max-restarts", "3",
                               "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
                               "--local_addr", f"127.0.0.{node + 1}"]) for node in (0, 1)]


def main(work):
    one, four, killed = work / "one", work / "four", work / "killed"
    data = write_data(work / "data", 100)
    more = ["--steps", 30, "--batch_size", 20, "--save_every", 5]
    launch(command(one, data, *more))
    for node in start(command(four, data, *more)):
        assert node.end() == 0, node.output
    assert_close_runs(one, four)
    print("4 ranks on 2 machines compute what 1 process does, within rounding")

    nodes = start(command(killed, data, *more))
    while not list(killed.glob("checkpoints/step-??????")):
        time.sleep(0.1)
    os.kill(max(nodes[1].ranks().values()), signal.SIGKILL)
    for node in nodes:
        assert node.end() == 0, node.output
    assert "resume    from" in nodes[0].output + nodes[1].output
    assert numbers(four) == numbers(killed) and bits(four / "model") == bits(killed / "model")
    print("one rank killed: the run is equal bit for bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
