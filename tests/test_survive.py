"""Runs that are killed, stopped, damaged or out of space: what is resumed is the same run.

Where it needs no process of its own, a run is a call of train.main(), and what happens to it
happens before one of its steps or before its export (the fixture `before`).
"""
import errno
import gc
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import EIGHT, rewind
from runs import (DEMO, ROOT, Run, assert_close_runs, bits, command, launch, metrics, numbers,
                  tensors)

import data
import model
import train
from model import InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LONG = ("--steps", 5000, "--batch_size", 5, "--save_every", 4)
LAST = "checkpoints/step-000008"


def assert_same_run(a, b):
    """Equal bit for bit: the numbers of every step, weights and moments, the exported model."""
    assert numbers(a) == numbers(b)
    assert bits(a / LAST) == bits(b / LAST) and bits(a / "model") == bits(b / "model")


def files(folder):
    """{path: contents} of all files in a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def edit(path, old, new):
    """Replace a text in a file."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run leaves its own: put those of pytest back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    kept = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, kept):
        signal.signal(number, handler)


def limit(what, size=resource.RLIM_INFINITY):
    """Let no file (RLIMIT_FSIZE) or not this process (RLIMIT_AS) grow beyond a size."""
    resource.setrlimit(what, (size, resource.RLIM_INFINITY))


@pytest.fixture
def before(monkeypatch):
    """before[n] = action: act once just before step n, from 1, of a run in this process; or before
    the "export", when the last checkpoint has been written."""
    actions = {}

    def batch_of(step, *others):
        if step + 1 in actions:
            actions.pop(step + 1)()
        return kept_batch_of(step, *others)

    def save(*args):
        if "export" in actions:
            actions.pop("export")()
        kept_save(*args)

    kept_batch_of, kept_save = data.batch_of, model.save
    for module in (data, train):
        monkeypatch.setattr(module, "batch_of", batch_of)
    for module in (model, train):
        monkeypatch.setattr(module, "save", save)
    return actions


@pytest.fixture
def program(monkeypatch, capsys):
    """program(arguments) -> (exit code, lines of stderr) of train.py, run as a program in here.
    Limits that were set meanwhile are lifted."""
    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(sys, "stdout", sys.stdout)          # the program replaces both
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        code = 0
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        limit(resource.RLIMIT_FSIZE)
        limit(resource.RLIMIT_AS)
        gc.collect()                            # closes files, which unlocks the folder
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.strip() and "step/s" not in line]
    return run


# ------------------------------------------------------------------------------------ the same run

def test_a_run_killed_at_any_moment_is_resumed_bit_for_bit(straight, demo_data, tmp_path):
    out = tmp_path
    (out / "metrics.jsonl").touch()                             # as a start that was killed leaves
    (out / "settings.json.tmp").write_text('{"mod')             # the folder
    run = Run(command(out, demo_data, *EIGHT)).until("saved")
    run.kill()
    assert run.end() == -signal.SIGKILL and not (out / "model").exists()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99, "los')                        # as a crash may leave it
    again, moment = Run(command(out, demo_data, *EIGHT)), random.uniform(0, 5)
    threading.Timer(moment, again.kill).start()
    again.end()
    print(f"killed again after {moment} seconds")
    train.main(command(out, demo_data, *EIGHT))
    assert_same_run(out, straight)


def test_torchrun_restarts_ranks_that_are_killed(two_ranks, demo_data, tmp_path):
    out, restarts = tmp_path / "run", ["--standalone", "--max-restarts", 1]
    run = Run(command(out, demo_data, *EIGHT), 2, restarts)
    os.kill(run.until("saved").ranks()[0], signal.SIGKILL)
    assert run.until("resume    from").end() == 0, run.output
    assert_same_run(out, two_ranks / "straight")


def test_a_run_is_resumed_by_another_number_of_ranks(straight, two_ranks, demo_data, tmp_path):
    """And with other settings that do not change the result."""
    two_to_one, copy = rewind(two_ranks / "straight", tmp_path / "run"), tmp_path / "copy"
    shutil.copy(demo_data, copy)
    train.main(command(two_to_one, copy, *EIGHT, "--micro_batch_tokens", 300, "--keep", 5))
    for out, first in ((two_to_one, two_ranks / "straight"), (two_ranks / "resumed", straight)):
        assert numbers(out)[:4] == numbers(first)[:4] and numbers(out)[4:] != numbers(first)[4:]
        assert_close_runs(out, straight)


def test_weights_and_moments_in_host_memory_compute_the_same_run(straight, demo_data, tmp_path):
    launch(command(tmp_path / "run", demo_data, *EIGHT, "--cpu_offload"), 3)
    assert_close_runs(tmp_path / "run", straight)


# ----------------------------------------------------------------------------------------- signals

def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(straight, demo_data, tmp_path, capsys,
                                                              before):
    for step, number in ((2, signal.SIGTERM), (5, signal.SIGUSR1), (7, signal.SIGINT)):
        before[step] = partial(os.kill, os.getpid(), number)
        train.main(command(tmp_path, demo_data, *EIGHT))
        assert f"stopped   by a signal after step {step} of 8" in capsys.readouterr().out
        assert train.checkpoints(tmp_path)[-1].endswith(f"step-00000{step}")
        assert not (tmp_path / "model").exists()
    before["export"] = partial(os.kill, os.getpid(), signal.SIGTERM)        # does not disturb it
    train.main(command(tmp_path, demo_data, *EIGHT))
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 0), (signal.SIGINT, 1)])
def test_a_signal_to_one_rank_or_to_torchrun_ends_all(number, code, demo_data, tmp_path):
    """torchrun reports its own interruption, but not before the ranks have saved."""
    run = Run(command(tmp_path, demo_data, *LONG), 2).until("saved")
    os.kill(run.ranks()[1] if number == signal.SIGUSR1 else run.pid, number)
    assert run.end() == code, run.output
    step = len(metrics(tmp_path))
    assert f"stopped   by a signal after step {step:,} of 5,000" in run.output
    assert train.checkpoints(tmp_path)[-1].endswith(f"step-{step:06d}")


def test_a_second_interrupt_ends_a_run_at_once(demo_data, tmp_path, monkeypatch, before, program):
    """Not one within a second, which torchrun may repeat."""
    def interrupt():
        now = time.monotonic()
        for seconds in (0, 0.5, 2):
            monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
            os.kill(os.getpid(), signal.SIGINT)
            passed.append(seconds)

    before[6], passed = interrupt, []
    code, err = program(command(tmp_path, demo_data, *EIGHT))
    assert code == 130 and passed == [0, 0.5] and "resumes from the last checkpoint" in err[-1]
    assert train.checkpoints(tmp_path) == [f"{tmp_path}/checkpoints/step-000004"]


# ----------------------------------------------------------------------------- settings and folders

def test_a_setting_that_changes_the_result_is_refused_with_both_values(straight, demo_data,
                                                                       tmp_path):
    out, other = rewind(straight, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(DEMO, other)
    edit(other / "config.json", '"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')
    twin = tmp_path / "twin"                    # the same configuration, other weights
    shutil.copytree(DEMO, twin)
    shutil.copy(straight / "model" / "model.safetensors", twin)
    (tmp_path / "data").write_text(Path(demo_data).read_text().replace("?", "!", 1))
    before = files(out)
    for more, words in [(["--lr", "2e-4"], "lr is 0.0002, but 0.0001 in .*settings.json"),
                        (["--steps", 9], "steps is 9, but 8 in"),
                        (["--lc_layer", 2], "lc_layer is 2, but 1 in"),
                        (["--dtype", "bf16"], "dtype is bf16, but fp32 in"),
                        (["--data", tmp_path / "data"], "digest of the records is .*, but"),
                        (["--model", other], "digest of the model is .*, but"),
                        (["--model", twin], "digest of the model is .*, but")]:
        with pytest.raises(InputError, match=words):
            train.main(command(out, demo_data, *EIGHT, *more))
    assert files(out) == before
    edit(out / "settings.json", '"lr": 0.0001', '"lr": 0.0002')
    with pytest.raises(InputError, match="lr is 0.0002, but 0.0001 in .*step-000004/state.json"):
        train.main(command(out, demo_data, *EIGHT, "--lr", "2e-4"))


def test_layers_that_were_chosen_are_stored_and_not_chosen_again(straight, demo_data, tmp_path,
                                                                 monkeypatch):
    out = rewind(straight, tmp_path / "run")
    monkeypatch.delattr(train, "read_layers")
    train.main(command(out, demo_data, *EIGHT, "--lc_layer", "auto", "--et_layer", "auto"))
    assert_same_run(out, straight)


def test_a_second_process_in_a_folder_is_refused_and_changes_nothing(straight, demo_data, tmp_path,
                                                                     before):
    def start_another():
        contents = files(tmp_path)
        with pytest.raises(InputError, match="another process trains in it"):
            train.main(command(tmp_path, demo_data, *EIGHT, "--lr", "2e-4"))
        assert files(tmp_path) == contents

    before[5] = start_another                   # while the first is about to make its fifth step
    train.main(command(tmp_path, demo_data, *EIGHT))
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("name", ["thesis.txt", "metrics.jsonl", "checkpoints/step-000004"])
def test_a_folder_with_other_files_is_refused_and_not_touched(name, demo_data, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"has {name.split('/')[0]} but no settings.json"):
        train.main(command(tmp_path, demo_data, *EIGHT))
    assert list(files(tmp_path).values()) == [b"precious"]


def test_a_finished_run_is_reported_again_and_not_changed(straight, demo_data, capsys):
    before = files(straight)
    train.main(command(straight, demo_data, *EIGHT))
    printed = capsys.readouterr().out
    assert "\nfinished  " in printed and f"The model is in {straight}/model" in printed
    assert files(straight) == before


def test_only_the_newest_checkpoints_are_kept(demo_data, tmp_path):
    for every, names in ((2, ["step-000004", "step-000005"]), (0, ["step-000005"])):
        out = tmp_path / str(every)
        train.main(command(out, demo_data, "--steps", 5, "--batch_size", 1, "--save_every", every))
        assert sorted(os.listdir(out / "checkpoints")) == names


# ------------------------------------------------------------------------------------------ damage

def damage(folder, kind):
    shard, state = folder / "shard-00001-model-00003-of-00007.safetensors", folder / "state.json"
    if kind == "a flipped bit":
        contents = bytearray(shard.read_bytes())
        contents[-100] ^= 1
        shard.write_bytes(contents)
    elif kind == "a lost file":
        shard.unlink()
    elif kind == "a file too many":             # as of a second rank
        shutil.copy(shard, str(shard).replace("shard-00001", "shard-00002"))
    elif kind == "an unreadable file":
        shard.unlink()
        shard.mkdir()
    elif kind == "a torn state.json":
        state.write_bytes(state.read_bytes()[:-9])
    elif kind == "an edited state.json":
        edit(state, '"step": 8', '"step": "8"')
    elif kind == "another step":
        edit(state, '"step": 8', '"step": 7')


@pytest.mark.parametrize("kind", ["a flipped bit", "a lost file", "a file too many",
                                  "an unreadable file", "a torn state.json",
                                  "an edited state.json", "another step"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind, straight, demo_data, tmp_path,
                                                            capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("model"))
    damage(out / LAST, kind)
    train.main(command(out, demo_data, *EIGHT))
    printed = capsys.readouterr().out
    assert f"warning   {out / LAST} is skipped" in printed
    assert f"resume    from {out}/checkpoints/step-000004, after step 4" in printed
    assert_same_run(out, straight)


def test_a_run_with_only_damaged_checkpoints_is_refused_and_kept(straight, demo_data, tmp_path):
    out = rewind(straight, tmp_path / "run")
    damage(out / "checkpoints/step-000004", "a flipped bit")
    before = files(out / "checkpoints")
    with pytest.raises(InputError, match="none of its checkpoints is intact; remove .*checkpoints"):
        train.main(command(out, demo_data, *EIGHT))
    assert files(out / "checkpoints") == before and len(metrics(out)) == 8


def test_layers_in_edited_settings_are_checked(straight, demo_data, tmp_path):
    out = rewind(straight, tmp_path / "run")
    edit(out / "settings.json", '"et_layer": 3', '"et_layer": null')
    args = [word for word in command(out, demo_data, *EIGHT) if word not in ("--et_layer", "3")]
    with pytest.raises(InputError, match="settings.json: lc_layer is 1, et_layer is None"):
        train.main(args)


@pytest.mark.parametrize("name", ["model", "model.partial", "checkpoints"])
def test_what_is_in_the_way_of_the_result_is_told_before_the_first_step(straight, demo_data,
                                                                        tmp_path, name):
    out = rewind(straight, tmp_path / "run")
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).write_text("notes")
    with pytest.raises(InputError, match="model.partial or checkpoints is in the way of this run"):
        train.main(command(out, demo_data, *EIGHT))
    assert (out / name).read_text() == "notes" and len(metrics(out)) == 8


# -------------------------------------------------------------------------- numbers, disk, memory

def test_a_step_that_is_not_finite_is_skipped_and_counted(demo_data, tmp_path, monkeypatch, capsys):
    def clip(parameters, limit):                # the gradient of the second step is not finite
        parameters = list(parameters)
        parameters[0].grad[0] *= next(factors)
        return kept(parameters, limit)

    kept, factors = torch.nn.utils.clip_grad_norm_, iter([1, torch.inf, 1, 1, 1, 1, 1, 1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train.main(command(tmp_path, demo_data, *EIGHT, "--save_every", 1, "--keep", 9))
    lines, printed = metrics(tmp_path), capsys.readouterr().out
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 1, 1, 1, 1]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None
    assert "skipped   step 2: loss or gradient not finite, 1 in a row" in printed
    assert "skipped   1 of 8 steps" in printed
    assert [path[-1] for path in train.checkpoints(tmp_path)] == list("1345678")
    state = json.loads((tmp_path / LAST / "state.json").read_text())
    assert (state["step"], state["updates"]) == (8, 7)


def test_too_many_bad_steps_end_the_run_and_name_the_last_checkpoint(demo_data, tmp_path, program):
    """After the first step at a learning rate of 1e15, every loss overflows."""
    code, err = program(command(tmp_path, demo_data, "--steps", 99, "--batch_size", 4, "--lr",
                                "1e15", "--save_every", 1))
    last = tmp_path / "checkpoints/step-000001"
    assert code == 1 and len(err) == 1 and err[0].startswith(
        f"error: step 11: loss or gradient not finite, 10 in a row; the last checkpoint is {last}")
    assert all(tensor.isfinite().all() for tensor in tensors(last).values())


def refuse(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("fault, moment, last", [("full", 8, 4), ("gone", 8, 4),
                                                 ("read-only", 8, 4), ("full", "export", 8)])
def test_a_disk_that_fails_is_one_line_and_costs_no_step_that_was_saved(
        fault, moment, last, straight, demo_data, tmp_path, monkeypatch, before, program):
    out, rename = tmp_path / "run", os.rename
    before[moment], words = {
        "full": (partial(limit, resource.RLIMIT_FSIZE, 2 ** 16), "File too large"),
        "gone": (partial(rename, out, tmp_path / "away"), "No such file or directory"),
        "read-only": (partial(monkeypatch.setattr, os, "rename", refuse), "Read-only")}[fault]
    code, err = program(command(out, demo_data, *EIGHT))
    assert code == 2 and len(err) == 1 and err[0].startswith(f"error: {out}: ") and words in err[0]
    assert f"give the same command with --out {out} to resume" in err[0]
    monkeypatch.setattr(os, "rename", rename)
    if fault == "gone":
        assert not out.exists(), "the folder is not made again"
        rename(tmp_path / "away", out)
    assert train.checkpoints(out)[-1] == f"{out}/checkpoints/step-00000{last}"
    train.main(command(out, demo_data, *EIGHT))
    assert_same_run(out, straight)


def test_memory_that_runs_out_is_one_line_with_advice(demo_data, tmp_path, before, program):
    """One prompt of 20,000 tokens, and 1 GiB is left for it."""
    def leave_one_gibibyte():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + 2 ** 30)

    shutil.copytree(DEMO, tmp_path / "model")
    edit(tmp_path / "model/config.json", '"max_position_embeddings": 512',
         '"max_position_embeddings": 32768')
    row = json.loads(Path(demo_data).read_text(encoding="utf-8").split("\n")[0])
    (tmp_path / "data").write_text(json.dumps({**row, "input": "a 1 " * 5000}))
    before[1] = leave_one_gibibyte
    code, err = program(command(tmp_path / "run", tmp_path / "data", "--max_length", 32768,
                                "--model", tmp_path / "model"))
    assert code == 2 and len(err) == 1 and "allocate memory" in err[0]
    assert "fewer --micro_batch_tokens, --activation_checkpointing" in err[0]


# --------------------------------------------------------------------------------- what is printed

def test_a_mistake_is_one_line_on_one_rank_of_each_machine(program, monkeypatch):
    for rank, lines in (("0", ["error: --lr is 0.0, expected more than 0"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert program(["--lr", "0"]) == (2, lines)


def test_an_error_of_one_rank_ends_all_without_a_traceback(demo_data, tmp_path):
    """The first rank finds the folder gone, while the second waits for it."""
    run = Run(command(tmp_path / "run", demo_data, *LONG), 2).until("saved")
    os.rename(tmp_path / "run", tmp_path / "away")
    assert run.end() == 1 and "exitcode  : 2" in run.output
    assert run.output.count("error: ") == 1 and "[rank" not in run.output, run.output


def test_a_run_survives_the_reader_of_its_output(straight, demo_data, tmp_path, monkeypatch,
                                                 program):
    """As in `python train.py 2>&1 | head`."""
    read, write = os.pipe()
    os.close(read)
    pipe = open(write, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "stderr", pipe)
    assert program(command(tmp_path, demo_data, *EIGHT)) == (0, [])
    with pytest.raises(BrokenPipeError):
        pipe.close()
    assert_same_run(tmp_path, straight)


def test_metrics_that_were_edited_are_kept_up_to_the_damage_and_the_run_says_so(
        straight, demo_data, tmp_path, capsys):
    out = rewind(straight, tmp_path / "run")
    edit(out / "metrics.jsonl", '{"step": 3,', '{"step": 3')
    train.main(command(out, demo_data, *EIGHT))
    assert [line["step"] for line in metrics(out)] == [1, 2, 5, 6, 7, 8]
    assert "metrics.jsonl has only 2 intact lines of the 4 before this" in capsys.readouterr().out
