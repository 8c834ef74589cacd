"""Answers, exact match by language, the lens and its picture: what eval.py does with a model."""
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
from data import Tokenizer, chat_template, make_records, read_rows
from eval import Subject, main, written_in
from model import InputError, load

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")
TEST = str(ROOT / "demo" / "test.jsonl")


def questions(lang, n):
    """The first records of the demo's test file in a language."""
    return [row for _, row in read_rows(TEST) if row["lang"] == lang][:n]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def run(*arguments, **more):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *arguments], capture_output=True,
                          text=True, timeout=120, **more)


# --------------------------------------------------------------------------------------- answers

def test_a_prompt_is_answered_on_the_command_line():
    row, = questions("en", 1)
    done = run("--model", DEMO, "--prompt", row["instruction"], "--template", "alpaca")
    assert done.returncode == 0 and done.stdout.strip() == row["output"], done.stderr


def test_every_line_typed_is_answered_and_a_long_one_loses_its_beginning(monkeypatch, capsys):
    long = "a b c " * 2000 + "What is the currency of France?"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"法国使用哪种货币？\n \n{long}\n"))
    with pytest.warns(UserWarning, match="prompts do not fit the model's positions"):
        main(["--model", DEMO, "--max_new_tokens", "4"])
        subject = Subject(DEMO, torch.float32, "cpu")
        expected = [subject.complete([text], 4)[0].strip() for text in ("法国使用哪种货币？", long)]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("rest, given, printed", [
    ("--max_new_tokens 2", b"caf\xe9?\nx\n", 2), ("--max_new_tokens 2 >&-", b"x\n", 0),
    (r"--max_new_tokens 2 --prompt $'\xff'", b"", 1),
    ("<&-", b"", 0), (f"--data {TEST} --limit 1 | head -1", b"", 1)])
def test_a_stream_that_is_closed_or_not_utf8_gives_no_traceback(rest, given, printed):
    command = f"{sys.executable} {ROOT / 'eval.py'} --model {DEMO} {rest}"
    done = subprocess.run(["bash", "-c", command], input=given, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout.count(b"\n")) == (0, printed), done.stderr
    assert b"Traceback" not in done.stderr and b"rror" not in done.stderr


@pytest.mark.parametrize("bos", [True, False])
def test_the_chat_template_decides_the_prompt(bos, tmp_path):
    def alpaca(folder, **more):
        return Subject(str(folder), torch.float32, "cpu", **more).alpaca
    tuned = tmp_path / "tuned"
    shutil.copytree(DEMO, tuned)
    assert not alpaca(tuned) and alpaca(tuned, template="alpaca")
    (tuned / "chat_template.jinja").write_text(chat_template(bos), encoding="utf-8")
    assert alpaca(tuned) and not alpaca(tuned, template="none")
    (tuned / "chat_template.jinja").write_text(chat_template(bos) + " ", encoding="utf-8")
    assert not alpaca(tuned)


# ----------------------------------------------------------------------------------- exact match

def test_the_table_counts_right_answers_and_those_in_the_language_english_last(tmp_path):
    zh, en = questions("zh", 2), questions("en", 3)
    en[0]["output"] += "!"                                  # one wrong; all three are English
    zh[0]["output"] = "Euro"
    path = write(tmp_path / "test.jsonl", [*en, *zh, {**questions("en", 1)[0], "lang": "ar"},
                                         {**questions("en", 1)[0], "lang": "fr"}])
    folders = {"before": DEMO, "after": DEMO}
    table = evaluation.compare(folders, path, "cpu", torch.float32).split("\n")
    assert table == [
        "| test | items | before | after |", "| --- | --- | --- | --- |",
        "| questions.ar exact_match | 1 | 100.0 ± 0.0 | 100.0 ± 0.0 |",
        "| questions.ar in_language | 1 | 100.0 ± 0.0 | 100.0 ± 0.0 |",      # as its gold answer
        "| questions.fr exact_match | 1 | 100.0 ± 0.0 | 100.0 ± 0.0 |",      # not judged
        "| questions.zh exact_match | 2 | 0.0 ± 0.0 | 0.0 ± 0.0 |",
        "| questions.zh in_language | 2 | 0.0 ± 0.0 | 0.0 ± 0.0 |",
        "| questions.en exact_match | 3 | 66.7 ± 33.3 | 66.7 ± 33.3 |",
        "| questions.en in_language | 3 | 100.0 ± 0.0 | 100.0 ± 0.0 |"]


@pytest.mark.parametrize("lang, yes, no", [
    ("zh", "欧元 (EUR)", "euro"), ("ar", "اليورو", "欧元"), ("vi", "Đồng euro", "Euro zone"),
    ("en", "The euro", "Giờ chuẩn miền Đông"), ("en", "Euro", "اليورو"), ("vi", "Tây Phi", "欧元区")])
def test_the_language_of_a_text_is_told_by_its_letters(lang, yes, no):
    assert written_in(lang, yes) and not written_in(lang, no)


@pytest.mark.parametrize("row, message", [
    (dict(instruction="a", input=""), "'output' is missing"),
    (dict(instruction=" ", input="", output="b"), "the question or the answer is blank"),
    (dict(instruction="a", output="\n"), "the question or the answer is blank")])
def test_a_question_without_text_or_answer_is_refused_with_its_line(row, message, tmp_path):
    path = write(tmp_path / "test.jsonl", [dict(instruction="a", output="b"), row])
    with pytest.raises(InputError, match=f"test.jsonl:2: {message}"):
        evaluation.read_questions(path)


# -------------------------------------------------------------------------------------- the lens

def slow_lens(prompt):
    """(entropy, probabilities) of the next token, (L + 1, tokens) and (L + 1, tokens, V), by
    transformers' hidden states, its final norm and its head."""
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        hidden = hf(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        states = [hf.model.norm(x[0]) for x in hidden[:-1]] + [hidden[-1][0]]      # the last has it
        p = torch.stack([hf.lm_head(x).softmax(-1) for x in states])
    return -(p * p.log()).sum(-1), p


def test_lens_is_the_mean_over_queries_and_reads_answers_where_prompts_end(tmp_path):
    out = str(tmp_path / "lens.json")
    path = write(tmp_path / "zh.jsonl", questions("vi", 1) + questions("zh", 4))
    main(["--model", DEMO, DEMO, "--task", "lens", "--data", path, "--lang", "zh", "--limit", "3",
          "--out", out])
    found, again = json.loads(Path(out).read_text())
    model = load(DEMO)
    rows = [("x", row) for row in questions("zh", 3)]
    records, _ = make_records(rows, Tokenizer(model.config), "both", 512)
    entropy, english, target = [], [], []
    for r in records:
        e, p = slow_lens(r.prompt)
        entropy.append(e[:, slice(*r.query)])
        target.append(torch.stack((p[:, -1, r.answer[0]], p[:, -1, r.answer_en[0]])))
        english.append(slow_lens(r.prompt_en)[0][:, slice(*r.prompt_en_query)])
    assert found["entropy"] == pytest.approx(torch.cat(entropy, 1).mean(1).tolist(), rel=1e-4)
    assert found["entropy_en"] == pytest.approx(torch.cat(english, 1).mean(1).tolist(), rel=1e-4)
    assert found["map"] == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in entropy[0].tolist()]
    for key, values in zip(("p_target", "p_english"), torch.stack(target).mean(0)):
        assert found[key] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-7)
    assert (found["n"], found["pivots"], found["lang"]) == (3, 3, "zh")
    assert again == found


def test_answers_that_begin_alike_say_nothing_of_the_english_answer(tmp_path):
    row = dict(instruction="问", input="", output="5 x", instruction_en="Q", output_en="5 y")
    path = write(tmp_path / "same.jsonl", [row, {**row, "output": "欧元"}, {**row, "output_en": ""}])
    out = tmp_path / "lens.json"
    main(["--model", DEMO, "--task", "lens", "--data", path, "--out", str(out)])
    found, = json.loads(out.read_text())
    assert (found["n"], found["pivots"]) == (2, 1)
    write(tmp_path / "same.jsonl", [dict(instruction="问", input="", output="5")])
    with pytest.raises(InputError, match="same.jsonl: no record with an English side"):
        main(["--model", DEMO, "--task", "lens", "--data", path])


def draw(folder, *arguments):
    command = [sys.executable, str(ROOT / "demo" / "figures.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_pictures_of_two_models_and_of_two_runs(tmp_path):
    images = pytest.importorskip("matplotlib.image", reason="pictures need: pip install matplotlib")
    lens = dict(model="runs/a/model", lang="zh", n=3, pivots=3, i=1, j=1, map=[[1, 2]] * 4,
                entropy=[3, 2, 1, 1], entropy_en=[3, 1, 1, 1], p_target=[0, 0, 0.1, 0.9],
                p_english=[0, 0.5, 0.1, 0.0])
    (tmp_path / "lens.json").write_text(json.dumps([lens, {**lens, "model": "b"}]))
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [dict(step=n, loss=9 / n, lc=None if n % 2 else 2 / n) for n in range(1, 50)]
        write(tmp_path / name / "metrics.jsonl", rows)
    for files in (["lens.json", "--layers", "1", "2"],
                  ["a/metrics.jsonl", "b/metrics.jsonl", "losses.png"]):
        done = draw(tmp_path, *files)
        assert done.returncode == 0, done.stderr
        assert images.imread(str(tmp_path / done.stdout.split()[-1]))[..., :3].std() > 0.05
    (tmp_path / "lens.json").write_text('{"scores": 1}')
    done = draw(tmp_path, "lens.json")
    assert done.returncode and done.stderr.startswith("error: lens.json: expected what")


# -------------------------------------------------------------------------------------- mistakes

TALK = "--prompt, or a chat, takes one --model and no --data"
TASK = "expected lens or xnli, .* with --data FILE"


@pytest.mark.parametrize("arguments, message", [
    (["--max_new_tokens", "0"], "--limit and --max_new_tokens: expected at least 1"),
    (["--prompt", "x", "--data", TEST], TALK), (["--prompt", "x", "--task", "xnli.en=x"], TALK),
    (["--prompt", "x", "--model", DEMO, DEMO], TALK), (["--items", "x"], TALK),
    (["--task", "lens"], f"--task lens: {TASK}"),
    (["--task", "lens.zh=x"], f"--task lens.zh=x: {TASK}"),
    (["--task", "lens", "--data", "x", "--items", "y"], "--items for the other tasks only"),
    (["--data", "x", "--data_en", "y"], "--data_en is for --task lens only"),
    (["--task", "squad", "--data", "x"], f"--task squad: {TASK}"),
    (["--task", "xnli", "xcopa.zh=x"], "--task xnli: expected .* each written TASK.LANG=FILE"),
    (["--task", "xcopa.zh=x", "--data", "y"], "--task xcopa.zh=x: expected"),
    (["--task", "xcopa", "--lang", "ar", "--data", "x"], "--lang ar: xcopa has zh, vi"),
    (["--data", TEST, "--lang", "fr"], "test.jsonl: no record has lang fr"),
    (["--task", "lens", "--data", TEST, "--lang", "fr"], r"no record .* \(and lang fr\)"),
    (["--data", "x", "--out", "no/such/folder/x"], "'no/such/folder/x': expected a file"),
    (["--data", "x", "--out", ""], "'': expected a file of its own"),
    (["--data", "x", "--out", "y", "--items", "y"], "'y': expected a file of its own"),
    (["--data", "x", "--out", "/dev/null"], "expected a file of its own in a writable folder"),
    (["--data", "x", "--out", "./x"], "'./x': expected a file of its own"),
    (["--data", "x", "--out", "y", "--items", "./y"], "'./y': expected a file of its own"),
    (["--task", "xcopa.zh=x", "--out", "x"], "'x': expected a file of its own"),
    (["--data", "x", "--out", f"{DEMO}/x"], "and not a model's folder"),
    (["--prompt", " "], "--prompt is blank"),
    (["--task", "xcopa.zh=x", "--lang", "vi"], "--task xcopa.zh=x: expected"),
    (["--data", "gone.jsonl"], "gone.jsonl: No such file"),
])
def test_a_mistake_is_refused_in_one_line_before_a_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr(evaluation, "load", None)
    with pytest.raises(InputError, match=message) as caught:
        main(["--model", DEMO, *arguments])
    assert "\n" not in str(caught.value)


def test_gemma_without_bos_is_refused(family):
    with pytest.raises(InputError, match="--bos never: a Gemma model needs BOS"):
        Subject(family("gemma2"), torch.float32, "cpu", bos="never")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run("--model", str(tmp_path), "--prompt", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
