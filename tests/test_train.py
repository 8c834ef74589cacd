"""One run: the loop against an independent computation, ranks against accumulation, what it prints and
refuses."""
import argparse
import json
import math
import os
from pathlib import Path

import pytest
import torch
from reference import losses
from runs import DEMO, ROOT, command, launch, metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bench
import train
from data import Tokenizer, make_records, read_parallel
from dft import Method
from model import Config

# -------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("arm", ["tft", "dft-logits", "dft-feature"])
def test_the_first_step_reports_what_transformers_computes(arm, demo_data, tmp_path, capsys):
    train.main(command(tmp_path / "run", demo_data, "--method", arm, "--steps", 1, "--batch_size", 40))
    line, = metrics(tmp_path / "run")
    config = Config.read(DEMO)
    side = "target" if arm == "tft" else "both"
    records, _ = make_records(read_parallel(demo_data), Tokenizer(config), side, 512)
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = losses(hf, records, Method(*train.ARMS[arm], 1, 3))
    for term in ("tft", "lc", "et"):
        if term in expected:
            value, count = expected[term]
            assert line[term] == pytest.approx(value.item() / count, rel=1e-4), term
        else:
            assert line[term] is None
    assert line["loss"] == pytest.approx(sum(line[t] for t in expected))


def test_the_first_step_on_smollm2_reports_what_transformers_computes(smollm2, shared, tmp_path, capsys):
    """The issue's command: 8 records of Chinese Alpaca, i = 2, j = 14; agreement within 0.2 %."""
    data = tmp_path / "zh8.jsonl"
    lines = (shared / "data" / "alpaca" / "zh.jsonl").read_text(encoding="utf-8").split("\n")[:8]
    data.write_text("\n".join(lines), encoding="utf-8")
    records, _ = make_records(read_parallel(str(data)), Tokenizer(Config.read(smollm2)), "both", 512)
    hf = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    for arm in ("dft-logits", "dft-feature"):
        train.main(["--model", smollm2, "--data", str(data), "--method", arm, "--lc_layer", "2",
                    "--et_layer", "14", "--steps", "1", "--batch_size", "8", "--dtype", "fp32",
                    "--device", "cpu",
                    "--out", str(tmp_path / arm)])
        line, = metrics(tmp_path / arm)
        with torch.no_grad():
            expected = losses(hf, records, Method(*train.ARMS[arm], 2, 14))
        for term, (value, count) in expected.items():
            assert line[term] == pytest.approx(float(value) / count, rel=2e-3), (arm, term)


@pytest.mark.parametrize("arm, more", [("dft-logits", []), ("dft-feature", ["--english_grad"])])
def test_one_rank_equals_two_ranks_equals_accumulation(arm, more, demo_data, tmp_path):
    """40 records in batches of 13: ragged micro-batches, and a last batch of one record that leaves a rank
    idle."""
    arguments = ["--method", arm, *more, "--batch_size", 13, "--epochs", 1, "--activation_checkpointing"]
    runs = {"one": (None, arguments[:-1]), "two": (2, arguments),
            "parts": (None, [*arguments, "--micro_batch_tokens", 300])}
    for name, (ranks, args) in runs.items():
        if ranks is None:
            train.main(command(tmp_path / name, demo_data, *args))
        else:
            done = launch(command(tmp_path / name, demo_data, *args), ranks)
            assert done.returncode == 0, done.stderr
    one = metrics(tmp_path / "one")
    assert len(one) == 4 and one[-1]["epoch"] == 1
    start = load_file(f"{DEMO}/model.safetensors")
    weights = load_file(tmp_path / "one" / "model" / "model.safetensors")
    moved = sum((weights[key] - start[key].float()).norm() ** 2 for key in weights) ** 0.5
    for other in ("two", "parts"):
        for a, b in zip(one, metrics(tmp_path / other), strict=True):
            assert a["tokens"] == pytest.approx(b["tokens"], abs=2)        # an idle rank's single token
            for key in ("loss", "tft", "lc", "et", "grad_norm", "lr"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (other, key)
        got = load_file(tmp_path / other / "model" / "model.safetensors")
        assert got.keys() == weights.keys()
        apart = sum((weights[key] - got[key]).norm() ** 2 for key in weights) ** 0.5
        assert apart <= 1e-3 * moved and max((weights[k] - got[k]).abs().max() for k in got) <= 1e-5, other


def test_twenty_steps_lower_every_loss(demo_data, tmp_path, capsys):
    for arm in ("dft-logits", "dft-feature"):
        train.main(command(tmp_path / arm, demo_data, "--method", arm, "--steps", 20, "--batch_size", 20))
        lines = metrics(tmp_path / arm)
        for term in ("tft", "lc", "et"):
            assert lines[-1][term] < 0.98 * lines[0][term], (arm, term)


def test_master_weights_are_fp32_so_a_small_bf16_step_moves_all(demo_data, tmp_path, capsys, monkeypatch):
    kept = {}
    monkeypatch.setattr(train, "save", lambda model, *_: kept.update(
        {name: p.detach().clone() for name, p in model.named_parameters()}))
    monkeypatch.setattr(train, "report", lambda *_: None)
    train.main(command(tmp_path / "run", demo_data, "--dtype", "bf16", "--lr", 1e-5, "--steps", 1))
    start = load_file(f"{DEMO}/model.safetensors")
    touched = [(p != start["model." + n].float()).float().mean() for n, p in kept.items() if "embed" not in n]
    assert all(p.dtype == torch.float32 for p in kept.values()) and min(touched) > 0.99


def test_learning_rate_climbs_in_equal_parts_and_falls_as_half_a_cosine():
    rates = [train.learning_rate(s, 100, 1.0, 0.04) for s in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[52] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert train.learning_rate(0, 1, 1.0, 0.03) == 1.0                # a single step is not lost to warm-up
    assert train.learning_rate(0, 10, 1.0, 0.0) == 1.0


@pytest.mark.parametrize("arm", ["tft", "dft-logits", "dft-feature"])
def test_the_benchmark_times_equal_work(arm, demo_data):
    given = bench.prepare(argparse.Namespace(model=DEMO, data=demo_data, method=arm, dtype="fp32", lc_layer=1,
                                             et_layer=3, records=6, device="cpu", micro_batch_tokens=200,
                                             length=None, compile="no"))
    a, b = ({term: float(value) for term, value in side(*given)[1](given[-1]).items()}
            for side in (bench.ours, lambda *given: bench.peer(*given, batch=4)))
    assert a == pytest.approx(b, rel=1e-4) and a["tft"] > 1


# -------------------------------------------------------------------------------------- what a user sees

def test_a_run_leaves_settings_metrics_and_a_model_and_says_where(demo_data, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(command(out, demo_data, "--steps", 3, "--batch_size", 16))
    said = capsys.readouterr().out
    assert f"The model is in {out}/model; next: python eval.py --model {out}/model" in said.splitlines()[-1]
    assert "40 of 40 records kept" in said and "lc_layer=1" in said
    assert "3 steps of 16 records, 3 an epoch" in said
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["epoch"] == 1
    assert set(lines[0]) == {"step", "epoch", "loss", "tft", "lc", "et", "lr", "grad_norm", "tokens",
                             "tokens_per_s", "seconds", "peak_mem_mib", "skipped"}
    saved = json.loads((out / "settings.json").read_text())
    assert saved["method"] == "dft-logits" and saved["lc_layer"] == 1 and saved["steps"] == 3
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"} <= set(
        os.listdir(out / "model"))


def test_auto_layers_are_chosen_and_said(demo_data, tmp_path, capsys):
    train.main(command(tmp_path / "run", demo_data, "--steps", 1, "--lc_layer", "auto", "--et_layer", "auto"))
    said = capsys.readouterr().out
    assert "layers    auto: i = " in said
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert 1 <= saved["lc_layer"] <= saved["et_layer"] <= 6


def test_without_out_each_run_gets_a_fresh_folder_under_runs(demo_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        arguments = command("", demo_data, "--steps", 1, "--batch_size", 2)
        at = arguments.index("--out")
        train.main(arguments[:at] + arguments[at + 2:])
    assert len(os.listdir("runs")) == 2
    assert all(Path("runs", run, "model", "model.safetensors").exists() for run in os.listdir("runs"))
    settings = argparse.Namespace(out=None, method="tft", model="m")
    assert len({train.claim(settings, {})[0] for _ in range(5)}) == 5, "within one second, too"


def test_sft_trains_on_english_and_tft_on_the_target_language_alone(demo_data, tmp_path, capsys):
    tokens = {}
    for arm in ("sft", "tft"):
        train.main(command(tmp_path / arm, demo_data, "--method", arm, "--steps", 1, "--batch_size", 40))
        line, = metrics(tmp_path / arm)
        assert line["lc"] is None and line["et"] is None
        tokens[arm] = line["tokens"]
    config = Config.read(DEMO)
    for arm, side in (("sft", "english"), ("tft", "target")):
        records, _ = make_records(read_parallel(demo_data), Tokenizer(config), side, 512)
        assert tokens[arm] == sum(len(r.prompt) + len(r.answer) for r in records)


def test_the_test_questions_are_answered_before_and_after_by_language(demo_data, tmp_path, capsys):
    """Trained on the very questions, the model answers them; before, it knew the English one alone."""
    lines = Path(demo_data).read_text(encoding="utf-8").split("\n")
    picked = [next(line for line in lines if f'"lang": "{lang}"' in line) for lang in ("zh", "vi", "ar")]
    (tmp_path / "three.jsonl").write_text("\n".join(picked), encoding="utf-8")
    row = json.loads(picked[0])
    english = {key: row[f"{key}_en"] for key in ("instruction", "input", "output")}
    (tmp_path / "test.jsonl").write_text("\n".join([*picked, json.dumps(english)]), encoding="utf-8")
    train.main(command(tmp_path / "run", tmp_path / "three.jsonl", "--steps", 40, "--lr", "1e-3",
                       "--test", tmp_path / "test.jsonl"))
    said = capsys.readouterr().out
    assert "| language | questions | before | after |" in said
    assert all(f"| {lang} | 1 | 0.0% | 100.0% |" in said for lang in ("ar", "vi", "zh"))
    assert "| en (retention) | 1 | 100.0% |" in said


def test_english_only_records_ride_along_in_a_dft_run(demo_data, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(demo_data).read_text(encoding="utf-8").split("\n")[:4]]
    rows += [dict(instruction="Say hello.", input="", output="Hello.")] * 2
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(rows), encoding="utf-8")
    train.main(command(tmp_path / "run", str(mixed), "--steps", 1, "--batch_size", 6))
    assert "6 of 6 records kept, 4 with an English side" in capsys.readouterr().out


def test_help_is_a_manual(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "torchrun --nproc_per_node 8" in said and "(default 2e-05)" in said


def test_without_arguments_the_demo_runs_with_its_own_settings():
    a = train.settings([])
    assert a.model == DEMO and a.method == "dft-logits" and a.test.endswith("test.jsonl")
    a = train.settings(["--model", "x", "--data", "y"])
    assert (a.batch_size, a.epochs, a.lr, a.warmup, a.weight_decay) == (128, 3, 2e-5, 0.03, 0)
    assert a.max_length == 512 and a.dtype == "bf16"


# -------------------------------------------------------------------------------------- dry run

LLAMA_7B = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                max_position_embeddings=4096, rms_norm_eps=1e-5)
LLAMA_70B = {**LLAMA_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.parametrize("shape, gpus, parameters, share", [(LLAMA_7B, 8, 6_738_415_616, "3.37"),
                                                            (LLAMA_70B, 64, 68_976_648_192, "4.31")])
def test_a_dry_run_plans_7b_on_8_and_70b_on_64(shape, gpus, parameters, share, demo_data, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    train.main(["--model", str(tmp_path), "--data", demo_data, "--dry_run", "--world_size", str(gpus)])
    said = capsys.readouterr().out
    assert f"{parameters:,} parameters" in said and "3 of 128 records" in said
    assert f"{share}  master weights" in said and f"{2 * float(share):.1f}" in said and "of 80: fits" in said
    assert "no tokenizer" in said               # so it says what it assumed


def test_a_dry_run_counts_replicas_host_memory_and_disk(demo_data, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    asked = ["--model", str(tmp_path), "--data", demo_data, "--dry_run", "--world_size", "16", "--replicas", "2"]
    train.main(asked)
    said = capsys.readouterr().out
    assert "3.37  master weights, fp32, 1/8" in said and "242.6 GB checkpoints, 13.5 GB for a model" in said
    train.main([*asked, "--cpu_offload"])
    assert "0.00  master weights, fp32, in host memory" in capsys.readouterr().out
    with pytest.raises(train.InputError, match="--replicas 3 does not divide --world_size 16"):
        train.main([*asked, "--replicas", "3"])


def test_a_dry_run_says_when_it_does_not_fit(demo_data, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    train.main(["--model", str(tmp_path), "--data", demo_data, "--dry_run"])
    assert "does NOT fit" in capsys.readouterr().out


def test_a_dry_runs_operation_count_is_that_of_the_layers_each_token_passes(demo_data, capsys):
    """Against a count by hand over the records: 6 FLOPs a weight and token, branches leaving at i and j."""
    train.main(["--model", DEMO, "--data", demo_data, "--dry_run", "--lc_layer", "1", "--et_layer", "3",
                "--epochs", "1", "--batch_size", "40"])
    said = capsys.readouterr().out
    config = Config.read(DEMO)
    records, _ = make_records(read_parallel(demo_data), Tokenizer(config), "both", 512)
    D, H, K, M, V = 192, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, \
        config.intermediate_size, config.vocab_size
    weights = 2 * D * H + 2 * D * K + 3 * D * M + 2 * D
    mean = sum(len(r.prompt) + len(r.answer) for r in records) / 40
    hand = 0
    for r in records:
        layers = (len(r.prompt) + len(r.answer)) * 6 + len(r.query_en) * 1 + len(r.answer_en) * 3
        hand += 3 * layers * (2 * weights + 4 * H * mean / 2)
        hand += 2 * V * D * (3 * len(r.answer) + 2 * (len(r.query_en) + len(r.answer_en)))
    assert f"1 of 40 records; {hand:.2e} FLOPs each" in said


# -------------------------------------------------------------------------------------- bad input

def refused(arguments, *words):
    """Exit code 2 and one line with these words, no traceback."""
    done = launch(arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in last, last


def test_a_users_mistake_ends_with_one_line_and_exit_code_2(demo_data, tmp_path):
    """The whole command once; the messages themselves are tested in-process below and in test_model,
    test_data."""
    refused(["--model", str(tmp_path / "none"), "--data", demo_data], "none", "No such file")


@pytest.mark.parametrize("more, words", [
    (["--lc_layer", "4", "--et_layer", "2"], "--lc_layer 4 lies above --et_layer 2"),
    (["--lc_layer", "0"], "--lc_layer is 0, expected auto or a layer from 1 to 6"),
    (["--et_layer", "7"], "--et_layer is 7, expected auto or a layer from 1 to 6"),
    (["--et_layer", "two"], "--et_layer is two"),
    (["--steps", "0"], "--steps is 0, expected at least 1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--lr", "0"], "--lr is 0"),
    (["--warmup", "3"], "--warmup is 3.0"),
    (["--test", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--method", "sft", "--lc", "logits"], "--method sft trains on English alone"),
    (["--device", "cuda"], "no CUDA device found"),
])
def test_impossible_settings_are_refused_by_name(more, words, demo_data, tmp_path):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so --device cuda is no mistake")
    with pytest.raises(train.InputError, match=words):
        train.main(command(tmp_path / "run", demo_data, *more))
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_dft_run_on_records_without_english_is_refused(tmp_path):
    data = tmp_path / "en.jsonl"
    data.write_text(json.dumps(dict(instruction="Say hello.", input="", output="Hello.")))
    with pytest.raises(train.InputError, match="no record has instruction_en.*--method tft"):
        train.main(command(tmp_path / "run", str(data)))
    train.main(command(tmp_path / "run", str(data), "--method", "tft", "--steps", 1))


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(demo_data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious")
    with pytest.raises(train.InputError, match="holds metrics.jsonl"):
        train.main(command(out, demo_data))
    assert (out / "metrics.jsonl").read_text() == "precious" and len(os.listdir(out)) == 1


def test_model_without_data_is_refused():
    with pytest.raises(train.InputError, match="--model needs --data"):
        train.main(["--model", DEMO])
