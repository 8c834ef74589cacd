"""Runs that die: what resumes is the same run; what is damaged is passed over; nothing bad is saved."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import DEMO, ROOT, Run, command, launch, metrics, numbers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from data import Tokenizer, batch_of, make_records, read_parallel
from model import Config, InputError, Transformer, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EIGHT = ("--steps", 8, "--batch_size", 10, "--save_every", 4)


def contents(folder):
    """{file: contents} of a folder: bytes, tensors as bytes (safetensors orders its header at random), and of
    state.json only how far the run was, since its settings name the folder."""
    files = {}
    for path in Path(folder).iterdir():
        files[path.name] = path.read_bytes()
        if path.name == "state.json":
            files[path.name] = json.loads(files[path.name])["progress"]
        elif path.suffix == ".safetensors":
            files[path.name] = {name: t.numpy().tobytes() for name, t in load_file(path).items()}
    return files


def same_run(a, b):
    """Equal bit for bit: losses of every step, weights, moments, generators, the exported model."""
    assert numbers(a) == numbers(b)
    for folder in ("checkpoints/step-000008", "model"):
        assert contents(a / folder) == contents(b / folder), folder


def close_run(a, b):
    """Equal within 1e-5: losses of every step, weights."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["step"] == y["step"] and x["tokens"] == y["tokens"]
        for key in ("loss", "tft", "lc", "et", "grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-5), (x["step"], key)
    x, y = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert max((x[key] - y[key]).abs().max() for key in x) <= 1e-5


def rewound(run, to):
    """A copy of a finished run as if it had died after the checkpoint at step 4, some steps on."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    shutil.rmtree(to / "checkpoints" / "step-000008")
    return to


@pytest.fixture(scope="module")
def straight(demo_data, tmp_path_factory):
    """Eight undisturbed steps in one process, checkpoints at 4 and 8."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run = launch(command(out, demo_data, *EIGHT))
    assert run.returncode == 0, run.stderr
    return out


@pytest.fixture(scope="module")
def straight2(demo_data, tmp_path_factory):
    """The same on two ranks."""
    out = tmp_path_factory.mktemp("straight2") / "run"
    run = launch(command(out, demo_data, *EIGHT), 2)
    assert run.returncode == 0, run.stderr
    return out


# -------------------------------------------------------------------------------------- the same run

@pytest.mark.parametrize("ranks", [None, 2])
def test_a_killed_run_goes_on_bit_for_bit(ranks, straight, straight2, demo_data, tmp_path):
    out = tmp_path / "run"
    run = Run(command(out, demo_data, *EIGHT), ranks).until("saved")
    run.kill()
    assert run.end().returncode == -signal.SIGKILL and not (out / "model").exists()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99, "los')                            # as a crash may leave it
    again = launch(command(out, demo_data, *EIGHT), ranks)
    assert again.returncode == 0, again.stderr
    assert f"resume    from {out}/checkpoints/step-00000" in again.stdout
    same_run(out, straight2 if ranks else straight)


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, straight, straight2, demo_data, tmp_path, capsys):
    out = rewound(straight2 if ranks is None else straight, tmp_path / "run")
    if ranks is None:
        train.main(command(out, demo_data, *EIGHT))
        said = capsys.readouterr().out
    else:
        again = launch(command(out, demo_data, *EIGHT), ranks)
        assert again.returncode == 0, again.stderr
        said = again.stdout
    assert "after step 4" in said
    close_run(out, straight)


def test_a_checkpoint_written_meanwhile_equals_one_written_at_once(straight2, demo_data, tmp_path):
    out = tmp_path / "run"
    done = launch(command(out, demo_data, *EIGHT, "--save_async", "yes"), 2)
    assert done.returncode == 0, done.stderr
    assert contents(out / "checkpoints/step-000004") == contents(straight2 / "checkpoints/step-000004")
    same_run(out, straight2)


def test_a_checkpoint_written_late_holds_the_step_at_which_it_was_asked_for(straight, demo_data, tmp_path,
                                                                            monkeypatch):
    """The writer begins only when a later step has changed the weights."""
    stepped, late = threading.Event(), []
    write, step = train.dcp.HuggingFaceStorageWriter.write_data, torch.optim.AdamW.step

    def write_later(self, *args):
        if not late:
            stepped.clear()
            late.append(stepped.wait(60))
        return write(self, *args)
    monkeypatch.setattr(train.dcp.HuggingFaceStorageWriter, "write_data", write_later)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (step(self, *args), stepped.set()))
    train.main(command(tmp_path / "run", demo_data, *EIGHT, "--save_async", "yes", "--lr", "1e-4"))
    assert late == [True]
    run, other = (load_file(out / "checkpoints/step-000004/shard-00001-model-00002-of-00007.safetensors")
                  for out in (tmp_path / "run", straight))
    assert all((run[name] - other[name]).abs().max() < 1e-5 for name in other)      # a step moves 1e-4


def test_replicas_and_host_memory_compute_the_same_run(straight, demo_data, tmp_path):
    """Four ranks as 2 replicas of 2 shards, weights and AdamW in host memory; the last four steps on one."""
    out = tmp_path / "run"
    done = launch(command(out, demo_data, *EIGHT, "--replicas", 2, "--cpu_offload"), 4)
    assert done.returncode == 0, done.stderr
    close_run(out, straight)
    train.main(command(rewound(out, tmp_path / "again"), demo_data, *EIGHT))
    close_run(tmp_path / "again", straight)


def test_random_numbers_go_on_too(demo_data, tmp_path, monkeypatch):
    """A step draws none today; one that draws, as dropout would, draws the same after a stop."""
    drawn, kept = [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *args: drawn.append(torch.rand(()).item()) or kept(*args))
    train.main(command(tmp_path / "a", demo_data, *EIGHT))
    train.main(command(rewound(tmp_path / "a", tmp_path / "b"), demo_data, *EIGHT))
    assert len(set(drawn[:8])) == 8 and drawn[8:] == drawn[4:8]


# -------------------------------------------------------------------------------------- signals, restarts

@pytest.mark.parametrize("ranks, number", [(2, signal.SIGTERM), (None, signal.SIGUSR1)])
def test_a_signal_to_one_rank_saves_and_ends_all_with_0(ranks, number, demo_data, tmp_path):
    out = tmp_path / "run"
    run = Run(command(out, demo_data, "--steps", 5000, "--batch_size", 10, "--save_every", 4), ranks)
    run.until("saved")
    os.kill(run.pid_of(1) if ranks else run.pid, number)
    assert run.end().returncode == 0, run.stderr
    step = len(metrics(out))
    assert f"stopped   by a signal after step {step:,} of 5,000" in run.stdout.splitlines()[-1]
    assert train.checkpoints(out)[-1].endswith(f"step-{step:06d}") and not (out / "model").exists()


def test_a_signal_to_torchrun_itself_saves_before_it_ends(demo_data, tmp_path):
    """As SLURM sends it to all processes of a step; torchrun hands it on."""
    out = tmp_path / "run"
    run = Run(command(out, demo_data, "--steps", 5000, "--batch_size", 10, "--save_every", 4), 2,
              ["--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]).until("saved")
    for pid in (*run.children(), run.pid):
        os.kill(pid, signal.SIGUSR1)
    run.end()
    step = len(metrics(out))
    assert f"stopped   by a signal after step {step:,} of 5,000" in run.stdout
    assert train.checkpoints(out)[-1].endswith(f"step-{step:06d}")


def test_torchrun_restarts_a_run_whose_ranks_are_killed(straight2, demo_data, tmp_path):
    out = tmp_path / "run"
    run = Run(command(out, demo_data, *EIGHT, "--save_every", 2), 2, ["--standalone", "--max-restarts", "3"])
    os.kill(run.until("saved").pid_of(1), signal.SIGKILL)
    os.kill(run.until("resume    from").until("saved").pid_of(0), signal.SIGKILL)
    assert run.until("resume    from").end().returncode == 0, run.stderr
    same_run(out, straight2)


def test_restarts_need_a_folder_and_a_way_to_find_one_another(tmp_path, monkeypatch):
    for key, value in dict(RANK="0", TORCHELASTIC_MAX_RESTARTS="3", TORCHELASTIC_USE_AGENT_STORE="True").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="--max-restarts needs --out"):
        train.main(["--device", "cpu"])
    with pytest.raises(InputError, match="--standalone .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train.main(["--device", "cpu", "--out", str(tmp_path)])


# -------------------------------------------------------------------------------------- what may differ

def test_a_setting_that_changes_the_result_is_refused_with_both_values(straight, demo_data, tmp_path):
    out = rewound(straight, tmp_path / "run")
    before = contents(out / "checkpoints/step-000004"), (out / "metrics.jsonl").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(Path(demo_data).read_text(encoding="utf-8").replace("?", "!", 1), encoding="utf-8")
    for more, words in [(["--lr", "2e-4"], "--lr is 0.0002, but .*settings.json has 0.0001"),
                        (["--steps", 9], "number of steps is 9, but .* has 8"),
                        (["--method", "tft"], "--method is tft, but .* has dft-logits"),
                        (["--lc_layer", 2], "--lc_layer is 2, but .* has 1"),
                        (["--dtype", "bf16"], "--dtype is bf16, but .* has fp32"),
                        (["--seed", 1], "--seed is 1, but .* has 0"),
                        (["--data", other], "digest of the tokenized data is .*, but .* has"),
                        (["--resume", "never"], "holds checkpoints, metrics.jsonl, settings.json")]:
        with pytest.raises(InputError, match=words):
            train.main(command(out, demo_data, *EIGHT, *more))
    assert before == (contents(out / "checkpoints/step-000004"), (out / "metrics.jsonl").read_bytes())


def test_a_setting_that_does_not_change_the_result_may_differ(straight, demo_data, tmp_path):
    out = rewound(straight, tmp_path / "run")
    copy = tmp_path / "copy.jsonl"
    shutil.copy(demo_data, copy)
    train.main(command(out, copy, *EIGHT, "--micro_batch_tokens", 300, "--keep", 5, "--activation_checkpointing"))
    close_run(out, straight)


def test_layers_that_were_chosen_are_not_chosen_anew(demo_data, tmp_path, capsys):
    asked = command(tmp_path / "run", demo_data, "--steps", 2, "--batch_size", 4, "--save_every", 1)
    train.main([*asked, "--lc_layer", "2", "--et_layer", "4"])                  # auto would take 1 and 3
    shutil.rmtree(tmp_path / "run/model")
    train.main([*asked, "--lc_layer", "auto", "--et_layer", "auto"])
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["lc_layer"], settings["et_layer"]) == (2, 4) and "auto:" not in capsys.readouterr().out


def test_a_finished_run_is_said_to_be_finished_and_left_alone(straight, demo_data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    train.main(command(out, demo_data, *EIGHT))
    assert f"finished: the model is in {out}/model" in capsys.readouterr().out
    same_run(out, straight)


def test_two_processes_cannot_train_in_one_folder(demo_data, tmp_path):
    out = tmp_path / "run"
    long = command(out, demo_data, "--steps", 5000, "--batch_size", 10, "--save_every", 4)
    first = Run(long).until("saved")
    second = launch(long)
    assert second.returncode == 2 and "another process trains in it" in second.stderr.splitlines()[-1]
    first.until("saved").kill()
    first.end()


def test_only_the_newest_checkpoints_are_kept(demo_data, tmp_path, capsys):
    train.main(command(tmp_path / "a", demo_data, "--steps", 7, "--batch_size", 4, "--save_every", 2))
    assert sorted(os.listdir(tmp_path / "a/checkpoints")) == ["step-000004", "step-000006"]
    train.main(command(tmp_path / "b", demo_data, "--steps", 3, "--batch_size", 4, "--save_every", 0))
    assert not (tmp_path / "b/checkpoints").exists()


# -------------------------------------------------------------------------------------- damage

def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda folder: flip(folder / "shard-00001-model-00003-of-00007.safetensors"),
    lambda folder: flip(folder / "state.json", 30),
    lambda folder: (folder / "shard-00001-model-00003-of-00007.safetensors").unlink(),
    lambda folder: (folder / "shard-00001-model-00003-of-00007.safetensors").write_bytes(b"{}" * 100),
    lambda folder: (folder / "state.json").unlink(),
    lambda folder: (folder / "state.json").write_text("[]"),
    lambda folder: (shutil.copy(folder / "shard-00001-model-00003-of-00007.safetensors",
                                folder / "shard-00002-model-00003-of-00007.safetensors"),
                    os.rename(folder, str(folder) + ".partial")),       # of two ranks
    lambda folder: shutil.copy(folder / "shard-00001-model-00003-of-00007.safetensors",
                               folder / "shard-00002-model-00003-of-00007.safetensors"),
], ids=["a flipped bit", "a flipped bit in state.json", "a file gone", "a file overwritten", "state.json gone",
        "state.json empty", "never finished", "a file too many"])
def test_a_damaged_checkpoint_is_said_and_passed_over(damage, straight, demo_data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "model")
    damage(out / "checkpoints/step-000008")
    train.main(command(out, demo_data, *EIGHT))
    said = capsys.readouterr().out
    assert any("step-000008" in line and "passes over" in line
               for line in said.splitlines())
    assert f"resume    from {out}/checkpoints/step-000004, after step 4" in said
    same_run(out, straight)


def test_a_lost_shard_of_the_first_rank_is_noticed_too(straight2, demo_data, tmp_path, capsys):
    """torch.distributed.checkpoint would leave its rows as they are, since the second rank's tell the shape."""
    out = tmp_path / "run"
    shutil.copytree(straight2, out)
    shutil.rmtree(out / "model")
    (out / "checkpoints/step-000008/shard-00001-model-00003-of-00007.safetensors").unlink()
    train.main(command(out, demo_data, *EIGHT))
    assert "after step 4" in capsys.readouterr().out
    close_run(out, straight2)


def test_damaged_checkpoints_alone_are_refused_and_kept(straight, demo_data, tmp_path):
    out = rewound(straight, tmp_path / "run")
    flip(out / "checkpoints/step-000004/shard-00001-model-00001-of-00007.safetensors")
    with pytest.raises(InputError, match="no checkpoint in it is whole; remove .* to begin anew"):
        train.main(command(out, demo_data, *EIGHT))
    assert (out / "checkpoints/step-000004/state.json").exists() and len(metrics(out)) == 8


def test_settings_that_are_no_settings_are_refused(demo_data, tmp_path):
    for text in ("[]", "{}", "{", '{"lc_layer": 1, "et_layer": 3}'):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(InputError, match="settings.json"):
            train.main(command(tmp_path, demo_data, *EIGHT))


# -------------------------------------------------------------------------------------- numbers gone bad

@pytest.fixture
def poisoned(demo_data, tmp_path):
    """A model in which one token, of one record alone, has an embedding so large that gradients overflow."""
    folder = tmp_path / "poisoned"
    shutil.copytree(DEMO, folder)
    records, _ = make_records(read_parallel(demo_data), Tokenizer(Config.read(DEMO)), "both", 512)
    seen = Counter(token for r in records for token in {*r.prompt, *r.answer, *r.query_en, *r.answer_en})
    token = next(token for token, times in seen.items() if times == 1)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()        # the head stays as it was
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    state["model.embed_tokens.weight"][token] = 3e38
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_step_that_is_not_finite_is_skipped_counted_and_said(poisoned, demo_data, tmp_path, capsys):
    """One epoch of four steps meets the record once; the other three steps train."""
    out = tmp_path / "run"
    train.main(command(out, demo_data, "--model", poisoned, "--steps", 4, "--batch_size", 10, "--seed", 1, "--save_every", 1,
                       "--keep", 9))
    lines, said = metrics(out), capsys.readouterr().out
    bad, = [line["step"] for line in lines if line["loss"] is None]
    assert [line["skipped"] for line in lines] == [int(step >= bad) for step in (1, 2, 3, 4)]
    assert f"skipped   step {bad}: loss or gradient is not finite; 1 in a row, 1 in all" in said
    assert "1 of 4 steps were skipped" in said
    assert [folder[-1] for folder in train.checkpoints(out)] == [str(s) for s in (1, 2, 3, 4) if s != bad]
    progress = json.loads(Path(train.checkpoints(out)[-1], "state.json").read_text())["progress"]
    assert progress == dict(step=4, updates=3, bad=0)
    model = load_file(out / "model" / "model.safetensors")
    assert all(t.isfinite().all() for t in model.values())


def test_too_many_bad_steps_end_the_run_and_name_the_last_good_checkpoint(demo_data, tmp_path):
    out = tmp_path / "run"
    done = launch(command(out, demo_data, "--steps", 99, "--batch_size", 40, "--max_bad_steps", 3, "--lr", "1e15",
                          "--save_every", 1))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite 3 steps in a row; the last checkpoint is " in done.stderr.splitlines()[-1]
    for folder in train.checkpoints(out):
        for file in Path(folder).glob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values())
    assert not (out / "model").exists() and len(train.checkpoints(out)) > 0


def test_weights_that_are_not_finite_are_never_saved(demo_data, tmp_path, monkeypatch):
    kept = torch.optim.AdamW.step

    def break_one(self, *args, **more):
        kept(self, *args, **more)
        with torch.no_grad():
            next(iter(self.state)).view(-1)[0] = torch.nan
    monkeypatch.setattr(torch.optim.AdamW, "step", break_one)
    for more in (["--save_every", 1], ["--save_every", 0]):
        out = tmp_path / "".join(map(str, more))
        with pytest.raises(FloatingPointError, match="not finite.*not saved; the last checkpoint is none"):
            train.main(command(out, demo_data, "--steps", 1, "--batch_size", 4, *more))
        assert not (out / "model").exists() and not train.checkpoints(out)


# -------------------------------------------------------------------------------------- a machine gone bad

def one_line_that_names(step, run, out):
    assert run.returncode == 2, run.stderr
    error = run.stderr.splitlines()[-1]
    assert error.startswith("error: ") and f"{out}/checkpoints/step-{step:06d}" in error, run.stderr
    assert "Traceback" not in run.stderr


def test_a_disk_that_takes_no_more_leaves_the_earlier_checkpoint(straight, demo_data, tmp_path):
    """The kernel refuses to let any file grow beyond 64 KiB, in the middle of the second save."""
    out = tmp_path / "run"
    run = Run(command(out, demo_data, *EIGHT)).until("saved")
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (2 ** 16, 2 ** 16))
    one_line_that_names(4, run.end(), out)
    assert "File too large" in run.stderr and f"the same command with --out {out} goes on" in run.stderr
    again = launch(command(out, demo_data, *EIGHT))
    assert again.returncode == 0, again.stderr
    same_run(out, straight)


def test_a_folder_that_vanished_is_an_error_and_not_made_anew(demo_data, tmp_path):
    out = tmp_path / "run"
    run = Run(command(out, demo_data, "--steps", 5000, "--batch_size", 10, "--save_every", 4)).until("saved")
    os.rename(out, tmp_path / "away")
    assert run.end().returncode == 2, run.stderr
    assert "No such file or directory" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not out.exists() and train.checkpoints(tmp_path / "away")


def test_memory_that_runs_out_names_the_micro_batch_and_what_lowers_it(demo_data, tmp_path):
    """One prompt of 20,000 tokens comes in the fourth step, and there is 1 GiB left for it."""
    lines = Path(demo_data).read_text(encoding="utf-8").split("\n")
    at = batch_of(3, 40, 10, 0)[0]
    lines[at] = json.dumps({**json.loads(lines[at]), "input": "a 1 " * 5_000})
    data, out = tmp_path / "long.jsonl", tmp_path / "run"
    data.write_text("\n".join(lines), encoding="utf-8")
    run = Run(command(out, data, "--max_length", 10 ** 6, "--steps", 4, "--batch_size", 10, "--save_every", 1))
    run.until("run  ")
    pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + 2 ** 30
    resource.prlimit(run.pid, resource.RLIMIT_AS, (room, room))
    one_line_that_names(3, run.end(), out)
    assert "out of memory in a micro-batch of 1 records and " in run.stderr
    assert "--micro_batch_tokens below 4096" in run.stderr


# -------------------------------------------------------------------------------------- no rank holds all

LOADING = """
import sys
from argparse import Namespace
import torch
import train
from dft import Method
from model import Config, save

def build(folder):
    a = Namespace(model=folder, dtype="fp32", activation_checkpointing=False, cpu_offload=False, replicas=1,
                  compile="no")
    return train.build(Config.read(folder), Method("none", "none"), a, ranks)

def growth(action):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                         # the peak begins anew
    before = peak()
    return action(), peak() - before

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

ranks = train.start(Namespace(device="cpu", seed=0, out="x", replicas=1, cpu_offload=False))
build(sys.argv[2])                                              # what torch takes once is not counted
model, loading = growth(lambda: build(sys.argv[1]))
size = 4 * sum(p.numel() for p in model.parameters())
_, saving = growth(lambda: save(model.model, sys.argv[3], torch.float32, size // 3))
print(f"peak {loading / size:.3f} {saving / size:.3f}")
"""


def test_no_rank_holds_the_whole_model_while_it_is_loaded_and_exported(family, tmp_path):
    """Of 160 MB of weights each of two ranks holds a half and little more, and the files come out the same."""
    shape = dict(model_type="llama", vocab_size=8000, hidden_size=512, intermediate_size=2048,
                 num_hidden_layers=8, num_attention_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(shape))
    save(Transformer(Config.read(str(tmp_path / "big"))), str(tmp_path / "whole"))
    (tmp_path / "program.py").write_text(LOADING)
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          str(tmp_path / "program.py"), str(tmp_path / "whole"), family("llama2"),
                          str(tmp_path / "parts")], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr
    peaks = [tuple(map(float, line.split()[1:])) for line in out.stdout.splitlines() if line.startswith("peak")]
    print(f"\npeak growth / weights, of each of two ranks, loading and exporting: {peaks}")
    assert len(peaks) == 2 and all(0.4 < loading < 0.65 and saving < 0.2 for loading, saving in peaks)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    a, b = ({n: t for f in (tmp_path / name).glob("*.safetensors") for n, t in load_file(f).items()}
            for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts").config.num_hidden_layers == 8
