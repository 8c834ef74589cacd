"""Answers to a prompt and accuracy by language, through the command that a user runs."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
from data import Tokenizer, prompt_text
from model import InputError, load

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")
TEST = ROOT / "demo" / "test.jsonl"


def english(n):
    rows = [json.loads(line) for line in TEST.read_text(encoding="utf-8").split("\n") if '"lang": "en"' in line]
    return rows[:n]


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *arguments], capture_output=True, text=True,
                          timeout=120)


def test_answers_equal_transformers_greedy_text_whatever_else_is_in_the_batch():
    rows = english(9) + [dict(instruction="法国使用哪种货币？", input="", output="欧元")]
    model = load(DEMO)
    tokenizer = Tokenizer(model.config)
    answers = evaluation.answer(model, tokenizer, [(row["instruction"], row["input"]) for row in rows])
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for row, answer in zip(rows, answers):
        ids = [tokenizer.bos_id] + tokenizer.encode([prompt_text(row["instruction"], "")])[0]
        out = hf.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=2, pad_token_id=2)
        expected = [i for i in out[0, len(ids):].tolist() if i != 2]
        assert answer == tokenizer.decode(expected).strip()


def test_exact_match_counts_by_language_and_knows_right_from_wrong():
    model = load(DEMO)
    right = [("en", row["instruction"], "", f" {row['output']}\n") for row in english(3)]
    wrong = [("xx", row["instruction"], "", row["output"] + "!") for row in english(2)]
    assert evaluation.exact_match(model, Tokenizer(model.config), right + wrong) == {"en": (3, 3), "xx": (0, 2)}


def test_the_table_has_a_row_a_language_and_english_last(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = english(2) + [{**english(1)[0], "lang": lang} for lang in ("zh", "ar")]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    table = evaluation.compare({"before": DEMO, "after": DEMO}, str(path), "cpu", torch.float32).splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["language", "---", "ar", "zh", "en (retention)"]
    assert table[-1] == "| en (retention) | 2 | 100.0% | 100.0% |"


def test_a_prompt_is_answered_on_the_command_line():
    row, = english(1)
    done = run("--model", DEMO, "--prompt", row["instruction"], "--device", "cpu", "--template", "alpaca")
    assert done.returncode == 0 and done.stdout.strip() == row["output"], done.stderr


def test_nothing_to_do_is_refused_in_one_line():
    done = run("--limit", "1")
    assert done.returncode == 2 and done.stderr == "error: nothing to do: give --model DIR, or --suite FILE\n"


def test_a_question_without_an_answer_is_refused_with_its_line(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(dict(instruction="a", input="")))
    with pytest.raises(InputError, match="test.jsonl:1: 'output' is missing"):
        evaluation.read_questions(str(path))


def test_a_missing_device_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert evaluation.pick_device("auto") == "cpu"
    with pytest.raises(InputError, match="no CUDA device found"):
        evaluation.pick_device("cuda")
