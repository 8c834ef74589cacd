"""English replay, held-out loss, question alignment, and training of chosen layers."""
import json
from pathlib import Path

import pytest
import reference
import torch
from runs import DEMO, command, launch, numbers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from data import Counts, Tokenizer, english_records, make_records, read_rows
from dft import Method
from model import Config, InputError


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(Config.read(DEMO))


def test_english_replay_adds_each_distinct_english_side_once(demo_data, tokenizer):
    rows = read_rows(demo_data)
    sides = {(row["instruction_en"], row["input_en"], row["output_en"]) for _, row in rows}
    doubled = rows + rows
    records = english_records(doubled, tokenizer, 512, 1.0, seed=0, counts=(counts := Counts()))
    assert len(records) == counts["English records added"] == len(sides)
    assert all(record.query_en is None for record in records)
    plain, _ = make_records(rows, tokenizer, "english", 512)
    assert {tuple(r.prompt + r.answer) for r in records} == {
        tuple(r.prompt + r.answer) for r in plain}


def test_the_english_share_depends_on_the_seed_only(demo_data, tokenizer):
    rows = read_rows(demo_data)

    def chosen(seed):
        return english_records(rows, tokenizer, 512, 0.5, seed, Counts())

    distinct = len({row["instruction_en"] for _, row in rows})
    assert len(chosen(0)) == round(0.5 * distinct)
    assert chosen(0) == chosen(0) and chosen(0) != chosen(1)


def test_question_alignment_translates_the_query_into_english(demo_data, tokenizer):
    rows = [(where, row) for where, row in read_rows(demo_data) if row["lang"] == "vi"][:3]
    records, _ = make_records(rows, tokenizer, "translation", 512)
    for record, (_, row) in zip(records, rows):
        prompt, answer = tokenizer.decode(record.prompt), tokenizer.decode(record.answer)
        assert "Translate the following sentences from Vietnamese to English." in prompt
        assert row["instruction"] in prompt and answer == row["instruction_en"]
    rows = [(where, {**row, "lang": "xx"}) for where, row in rows]
    records, _ = make_records(rows, tokenizer, "translation", 512)
    assert "sentences to English." in tokenizer.decode(records[0].prompt)


def test_held_out_losses_are_those_of_the_reference_and_change_nothing(demo_data, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(Path(demo_data).read_text(encoding="utf-8").split("\n")[:5]),
                    encoding="utf-8")
    train.main(command(tmp_path / "a", demo_data, "--steps", 3, "--batch_size", 8))
    train.main(command(tmp_path / "b", demo_data, "--steps", 3, "--batch_size", 8,
                       "--val", held, "--val_every", 1))
    with_val = numbers(tmp_path / "b")
    without = [{key: value for key, value in line.items() if not key.startswith("val_")}
               for line in with_val]
    assert without == numbers(tmp_path / "a")
    records, _ = make_records(read_rows(str(held)), Tokenizer(Config.read(DEMO)), "both", 512)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model", dtype=torch.float32)
    expected = reference.losses(hf, records, Method("logits", "logits", 1, 3))
    for term, (total, count) in expected.items():
        # sums of some hundred fp32 terms, computed in another order
        assert with_val[-1][f"val_{term}"] == pytest.approx(total.item() / count, rel=1e-4)


def test_only_the_chosen_weights_are_trained(demo_data, tmp_path):
    train.main(command(tmp_path / "run", demo_data, "--steps", 2, "--batch_size", 8,
                       "--lc", "none", "--train_layers", "2-3", "--train_modules", "mlp"))
    before = load_file(Path(DEMO, "model.safetensors"))
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {f"model.layers.{k}.mlp.{part}_proj.weight"
                       for k in (1, 2) for part in ("gate", "up", "down")}
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    stored = json.loads(state.read_text())
    assert len(stored["files"]) == 2                    # one for each of the two layers


def test_a_loss_below_the_trained_layers_is_refused(demo_data, tmp_path):
    with pytest.raises(InputError, match="--train_layers 2-3: a loss at layer i = 1"):
        train.main(command(tmp_path, demo_data, "--steps", 2, "--train_layers", "2-3"))


def test_chosen_layers_on_two_ranks_give_the_losses_of_one(demo_data, tmp_path):
    more = ["--steps", 3, "--batch_size", 8, "--train_layers", "1-2"]
    for ranks in (None, 2):
        launch(command(tmp_path / str(ranks), demo_data, *more), ranks)
    for one, two in zip(numbers(tmp_path / "None"), numbers(tmp_path / "2")):
        for key in ("loss", "grad_norm"):       # fp32 sums in another order
            assert one[key] == pytest.approx(two[key], rel=1e-4)
