"""One run: its numbers, what it leaves and prints, what it estimates, what it refuses."""
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from reference import losses
from runs import (DEMO, assert_close_runs, bits, command, metrics, numbers, tensors,
                  write_data)
from transformers import AutoModelForCausalLM

import train
from data import Tokenizer, make_records, read_parallel
from dft import Method
from model import Config, InputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
METHODS = ["tft", "dft-logits", "dft-feature"]


def records_of(data, side):
    """The records of a file, as a run reads them."""
    return make_records(read_parallel(data), Tokenizer(Config.read(DEMO)), side, 512)[0]


# ------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_logs_the_losses_that_transformers_computes(method, tmp_path):
    """Means over hundreds of tokens, of equal weights in fp32: rounding errors stay below 1e-5."""
    data = write_data(tmp_path / "data", 12)
    train.main(command(tmp_path / "run", data, "--method", method, "--steps", 1))
    line, = metrics(tmp_path / "run")
    records = records_of(data, "target" if method == "tft" else "both")
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        expected = losses(hf, records, Method(*train.SIGNALS[method], 1, 3))
    for term in ("tft", "lc", "et"):
        if term in expected:
            value, count = expected[term]
            assert line[term] == pytest.approx(value.item() / count, rel=1e-5), term
        else:
            assert line[term] is None
    assert line["loss"] == pytest.approx(sum(line[term] for term in expected), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_equals_two_ranks_equals_accumulation(method, demo_data, tmp_path, two_ranks):
    """Four steps on 40 records in batches of 13: ragged micro-batches, and in the last step a
    single record, with which one of two ranks is idle."""
    arguments = ["--method", method, "--batch_size", 13, "--epochs", 1]
    train.main(command(tmp_path / "one", demo_data, *arguments))
    train.main(command(tmp_path / "parts", demo_data, *arguments, "--micro_batch_tokens", 300))
    assert len(metrics(tmp_path / "one")) == 4
    assert_close_runs(tmp_path / "one", tmp_path / "parts")
    assert_close_runs(tmp_path / "one", two_ranks / method)


def test_activation_checkpointing_changes_no_bit(demo_data, tmp_path):
    """Backward repeats the operations of forward on the same numbers."""
    for name, more in (("kept", []), ("recomputed", ["--activation_checkpointing"])):
        train.main(command(tmp_path / name, demo_data, "--steps", 2, "--batch_size", 4, *more))
    assert numbers(tmp_path / "kept") == numbers(tmp_path / "recomputed")
    assert bits(tmp_path / "kept/model") == bits(tmp_path / "recomputed/model")


@pytest.mark.parametrize("method", METHODS[1:])
def test_ten_steps_on_eight_records_lower_every_loss(method, tmp_path):
    data = write_data(tmp_path / "data", 8)
    train.main(command(tmp_path / "run", data, "--method", method, "--epochs", 10,
                       "--lr", "5e-4"))
    first, *_, last = metrics(tmp_path / "run")
    for term in ("tft", "lc", "et"):
        assert last[term] < 0.95 * first[term], term


def test_a_bf16_run_moves_weights_by_less_than_bf16_can_show(demo_data, tmp_path):
    """Weights stay in fp32. A first step of Adam moves each by lr = 1e-5; bf16 has 8 bits, so most
    weights, of some 0.02, would round back to what they were."""
    train.main(command(tmp_path, demo_data, "--dtype", "bf16", "--lr", 1e-5, "--steps", 1))
    start, weights = tensors(DEMO), tensors(tmp_path / "checkpoints/step-000001")
    for name in start:
        if "layers" in name:
            moved = (weights[name] - start[name]).abs()
            assert (moved > 0).float().mean() > 0.99 and moved.max() < 1.1e-5, name


def test_the_learning_rate_rises_evenly_and_falls_as_half_a_cosine():
    rates = [train.learning_rate(step, 100, 1.0, 0.04) for step in range(100)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[52] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert train.learning_rate(0, 1, 1.0, 0.03) == 1.0, "a single step is no warm-up"
    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0


# ------------------------------------------------------------------------------- what a user sees

def test_the_demo_runs_and_says_what_to_do_next(tmp_path, capsys):
    """`python train.py --steps 20`, but with fewer records and questions."""
    questions = Path(train.DEMO["test"]).read_text(encoding="utf-8").split("\n")
    (tmp_path / "test.jsonl").write_text("\n".join(questions[::50]), encoding="utf-8")
    out = tmp_path / "run"
    train.main(["--steps", "20", "--batch_size", "6", "--out", str(out), "--test",
                str(tmp_path / "test.jsonl")])
    printed = capsys.readouterr().out
    assert "layers    i = 1, j = 3 of 6" in printed
    assert "20 steps of 6 records" in printed and "| test | items | before | after |" in printed
    model, chat, lens = printed.splitlines()[-3:]
    assert model.startswith(f"The model is in {out}/model. Next")
    assert chat.split() [:4] == ["python", "eval.py", "--model", f"{out}/model"]
    assert f"--model {DEMO} {out}/model --task lens" in lens
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_a_run_leaves_settings_metrics_a_checkpoint_and_a_model(demo_data, tmp_path):
    train.main(command(tmp_path, demo_data, "--steps", 3, "--batch_size", 16))
    names = sorted(os.listdir(tmp_path))
    assert names == ["checkpoints", "metrics.jsonl", "model", "settings.json"]
    assert os.listdir(tmp_path / "checkpoints") == ["step-000003"]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["epoch"] == 1
    assert list(lines[0]) == ["step", "epoch", "loss", "tft", "lc", "et", "lr", "grad_norm",
                              "tokens", "tokens_per_s", "seconds", "peak_mem_mib", "skipped"]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["method"], settings["lc_layer"], settings["steps"]) == ("dft-logits", 1, 3)


def test_without_out_every_run_gets_a_new_folder(demo_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command("", demo_data, "--steps", 1, "--batch_size", 1, "--method", "tft")
    at = arguments.index("--out")
    for _ in range(3):                              # within one second, perhaps
        train.main(arguments[:at] + arguments[at + 2:])
    assert len(list(Path("runs").glob("tft-model-*/model"))) == 3


def test_sft_trains_on_the_english_side_and_tft_on_the_target_language(demo_data, tmp_path):
    for method, side in (("sft", "english"), ("tft", "target")):
        out = tmp_path / method
        train.main(command(out, demo_data, "--method", method, "--steps", 1, "--batch_size", 40))
        line, = metrics(out)
        assert line["lc"] is None and line["et"] is None
        assert line["tokens"] == sum(len(record.prompt) + len(record.answer)
                                     for record in records_of(demo_data, side))


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert "torchrun --nproc_per_node 8 train.py" in printed and "(default: 2e-05)" in printed
    for option in vars(train.parse([])):
        entry = re.search(rf"\n  --{option}\b(.*\n)( {{10}}.*\n)*", printed)
        words = re.findall(r"[a-z]{2,}", entry[0].split("  ", 2)[2])
        assert len(words) >= 3, f"--{option} has no sentence"


def test_the_defaults_are_those_of_the_paper_and_of_stanford_alpaca():
    args = train.parse(["--model", "x", "--data", "y"])
    assert (args.epochs, args.batch_size, args.lr) == (3, 128, 2e-5)
    assert (args.warmup, args.weight_decay, args.max_length, args.dtype) == (0.03, 0, 512, "bf16")


# ------------------------------------------------------------------------------------- dry run

SMALL = dict(intermediate_size=11008, hidden_size=4096, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32)
LARGE = dict(intermediate_size=28672, hidden_size=8192, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8)


def dry_run(capsys, folder, data, sizes, *more):
    """What --dry_run prints for a LLaMA-2 of these sizes with the demo's tokenizer: no weights."""
    config = dict(sizes, model_type="llama", vocab_size=3200)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(Path(DEMO, "tokenizer.model").read_bytes())
    train.main(["--model", str(folder), "--data", data, "--dry_run", *map(str, more)])
    return capsys.readouterr().out


@pytest.mark.parametrize("sizes, gpus, parameters, states", [
    (SMALL, 8, 6_502_486_016, 13.0),        # a 7B but for its vocabulary; 16 bytes / 8 per weight
    (LARGE, 64, 68_504_788_992, 17.1),      # a 70B; 16 bytes / 64 per weight
    (SMALL, 1, 6_502_486_016, 117.0),       # 16 bytes, and 2 for a copy in bf16
])
def test_a_dry_run_tells_steps_memory_and_disk(sizes, gpus, parameters, states, demo_data, tmp_path,
                                               capsys):
    printed = dry_run(capsys, tmp_path, demo_data, sizes, "--world_size", gpus)
    assert f"{parameters:,} parameters" in printed and "40 of 40 records kept" in printed
    assert "3 steps," in printed and "GPU hours at 40 % of the peak of an H100" in printed
    assert f"memory    {states} GB on each of {gpus} GPUs for weights" in printed
    disk = 36e-9 * parameters, 2e-9 * parameters        # 3 checkpoints of 12 bytes; 2 bytes
    assert "{:,.1f} GB of checkpoints, {:,.1f} GB for the model".format(*disk) in printed


def test_a_dry_run_counts_what_is_trained_and_where(demo_data, tmp_path, capsys):
    printed = dry_run(capsys, tmp_path, demo_data, SMALL, "--train_layers", "1-8", "--lc", "none",
                      "--et_layer", 8, "--world_size", 8)
    trained = 8 * (4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096)
    assert f"{trained:,} of them trained" in printed
    assert f"memory    {(4 * 6_502_486_016 + 12 * trained) / 8e9:.1f} GB" in printed
    printed = dry_run(capsys, tmp_path, demo_data, SMALL, "--cpu_offload", "--world_size", 8)
    assert "memory    0.0 GB" in printed


def test_a_dry_run_counts_six_flops_for_each_weight_and_token(demo_data, capsys):
    train.main(["--model", DEMO, "--data", demo_data, "--dry_run", "--epochs", "2"])
    tokens = 0
    for record in records_of(demo_data, "both"):
        tokens += sum(map(len, (record.prompt, record.answer, record.query_en, record.answer_en)))
    assert f"2 steps, at most {2 * 6 * 3_271_104 * tokens:.2e} FLOPs" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- refused

@pytest.mark.parametrize("more, words", [
    (["--lc_layer", "0"], "--lc_layer is 0, expected auto or a layer from 1 to 6"),
    (["--et_layer", "7"], "--et_layer is 7, expected auto or a layer from 1 to 6"),
    (["--et_layer", "two"], "--et_layer is two"),
    (["--lc_layer", "4", "--et_layer", "2"], "lc_layer 4 is above et_layer 2"),
    (["--steps", "0"], "--steps is 0, expected more than 0"),
    (["--lr", "nan"], "--lr is nan, expected more than 0"),
    (["--weight_decay", "-1"], "--weight_decay is -1.0, expected at least 0"),
    (["--warmup", "3"], "--warmup is 3.0, expected"),
    (["--method", "sft", "--lc", "logits"], "--method sft takes no --lc and --et"),
    (["--method", "tft", "--et_layer", "3"], "--et_layer has no effect with these settings"),
    (["--lc", "feature", "--et", "feature", "--align", "position"], "--align has no effect"),
    (["--method", "sft", "--english", "1"], "--english has no effect"),
    (["--method", "tft", "--data_en", "x"], "--data_en has no effect"),
    (["--pool", "last"], "--pool has no effect"), (["--val_every", "7"], "--val_every has no"),
    (["--cpu_offload"], "--cpu_offload needs torchrun"),
    (["--model", "nowhere"], "nowhere: no config.json; no such folder"),
])
def test_impossible_settings_are_refused_before_a_folder_is_made(more, words, demo_data, tmp_path):
    with pytest.raises(InputError, match=words):
        train.main(command(tmp_path / "run", demo_data, *more))
    assert not (tmp_path / "run").exists()


def test_one_file_as_both_sides_is_refused_however_it_is_written(demo_data, tmp_path):
    (tmp_path / "link").symlink_to(demo_data)
    with pytest.raises(InputError, match="--data_en: expected another file than --data"):
        train.main(command(tmp_path / "run", demo_data, "--data_en", tmp_path / "link"))


def test_checkpoints_are_sorted_by_their_number(tmp_path):
    for name in ("step-1000000", "step-000025", "step-999999", "step-7x", "step-000026.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [Path(path).name for path in train.checkpoints(str(tmp_path))]
    assert names == ["step-000025", "step-999999", "step-1000000"]


def test_a_missing_file_is_refused_before_the_first_step(demo_data, tmp_path):
    for option in ("--data", "--data_en", "--test"):
        with pytest.raises(InputError, match="nowhere.jsonl: No such file"):
            train.main(command(tmp_path, demo_data, option, "nowhere.jsonl"))
    assert metrics(tmp_path) == []
    with pytest.raises(InputError, match="--model needs --data"):
        train.main(["--model", DEMO])


def test_weights_that_do_not_fit_are_refused_before_the_data_is_read(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="model.safetensors"):
        train.main(command(tmp_path / "run", "nowhere.jsonl", "--model", tmp_path / "model"))


def test_dft_on_data_without_english_is_refused_by_a_run_and_by_a_dry_run(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(dict(instruction="Say hello.", input="", output="Hello.")))
    for more in ([], ["--dry_run"]):
        with pytest.raises(InputError, match="no row has an English side.*--method tft"):
            train.main(command(tmp_path / "run", data, *more))
    train.main(command(tmp_path / "run", data, "--method", "tft", "--steps", 1))
