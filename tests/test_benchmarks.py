"""The benchmarks: prompts to the letter, scores against slow references, files that do not fit."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from agree import TASKS as AGREED
from agree import digest, our_file
from transformers import AutoModelForCausalLM

import eval as evaluation
from eval import Item, Subject, log_likelihoods, main, make_item, matches, read_test, score
from model import InputError, load

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")

# -------------------------------------------------------------------------------------- prompts

NLI = dict(premise="P", hypothesis="H", label=1)
COPA = dict(premise=" 他来了。", choice1="A.", choice2="B.", question="cause", label="1")
QA = dict(context="C.", question="Q?", answers=dict(text=["x", "y"]))
MC = dict(question="Q?", mc1_targets=dict(choices=["a", "b"], labels=[1, 0]),
          mc2_targets=dict(choices=["a", "c", "b"], labels=[1, 1, 0]))
FLAT = dict(question=" 谁 [title]  [1]来了？", mc1_targets_choices=["甲", "乙"],
            mc1_targets_labels=[1, 0], mc2_targets_choices=["甲", "丙", "乙"],
            mc2_targets_labels=[1, 1, 0])
GOLDEN = [
    ("xnli", "en", NLI, "", [" P, right? Yes, H", " P, right? Also, H", " P, right? No, H"], 1),
    ("xnli", "vi", {**NLI, "label": "contradiction"}, "",
     [" P, đúng? Vâng, H", " P, đúng? Vì vậy, H", " P, đúng? Không, H"], 2),
    ("xnli", "ar", NLI, "", [" P, صحيح? نعم, H", " P, صحيح? لذا, H", " P, صحيح? رقم, H"], 1),
    ("xcopa", "zh", COPA, "他来了 因为", [" a.", " b."], 1),
    ("xcopa", "vi", dict(premise="Anh đến.", choice1="Đó.", choice2="B", label=0,
                         question="effect"),
     "Anh đến vì vậy", [" đó.", " b"], 0),
    ("truthfulqa", "en", MC, evaluation.PRIMER + "\n\nQ: Q?\nA:", [" a", " b", " a", " c", " b"],
     [2, [1, 1, 0]]),
    ("truthfulqa", "zh", FLAT, evaluation.PRIMER + "\n\nQ: 谁.  来了？\nA:",
     [" 甲", " 乙", " 甲", " 丙", " 乙"], [2, [1, 1, 0]]),
    ("xquad", "en", QA, "Context: C.\n\nQuestion: Q?\n\nAnswer:", [], ["x", "y"]),
    ("xquad", "vi", QA, "Bối cảnh: C.\n\nCâu hỏi: Q?\n\nTrả lời:", [], ["x", "y"]),
    ("xquad", "ar", QA, "سيا: C.\n\nسؤال: Q?\n\nإجابة:", [], ["x", "y"]),
    ("mlqa", "ar", QA, "Context: C.\n\nQuestion: Q?\n\nAnswer:", [], ["x", "y"]),
]


@pytest.mark.parametrize("task, lang, row, context, choices, gold", GOLDEN)
def test_prompts_to_the_letter(task, lang, row, context, choices, gold):
    assert make_item(task, lang, row) == Item(context, choices, gold)


# --------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("rules, lang, text, gold, exact, f1", [
    ("xquad", "en", "The Cat!", "cat", 1, 1), ("xquad", "en", "a cat and dog", "cat dog", 0, 0.8),
    ("xquad", "en", "1990年。", "1990年", 0, 0), ("mlqa", "zh", "1990年。", "1990年", 1, 1),
    ("mlqa", "zh", "北京城", "北京", 0, 0.8), ("mlqa", "vi", "của Pháp", "Pháp", 1, 1),
    ("xquad", "en", "của Pháp", "Pháp", 0, 2 / 3), ("mlqa", "ar", "البيت", "بيت", 1, 1),
    ("mlqa", "ar", "مالك", "مالك بن أنس", 0, 0.5), ("xquad", "en", "البيت", "بيت", 0, 0),
    ("xquad", "en", "", "the", 1, 1), ("xquad", "en", "x", "", 0, 0)])
def test_exact_match_and_f1_of_each_benchmark(rules, lang, text, gold, exact, f1):
    assert matches(rules, lang, text, [gold]) == dict(exact_match=exact, f1=pytest.approx(f1))
    best = matches(rules, lang, text, ["no such answer", gold])
    assert best["f1"] == pytest.approx(f1), "the best of the accepted answers"


def score_of(task, lang, gold, answer):
    return score(evaluation.Test(task, lang, "file", []), Item("", [], gold), answer)


def test_scores_of_an_item():
    assert score_of("xcopa", "zh", 0, [-1.0, -1.0]) == {"acc": 1}
    assert score_of("xcopa", "zh", 1, [-1.0, -1.0]) == {"acc": 0}
    both = [math.log(p) for p in (0.1, 0.2, 0.3, 0.1, 0.4)]
    expected = dict(mc1=0, mc2=pytest.approx(0.7 / 0.8))
    assert score_of("truthfulqa", "en", [2, [1, 0, 1]], both) == expected
    far = score_of("truthfulqa", "en", [1, [1, 0]], [-2000.0, -2001.0, -2000.0])
    assert far == dict(mc1=1, mc2=pytest.approx(1 / (1 + math.e))), "no underflow"
    found = score_of("xquad", "zh", ["甲", "1990年。"], " 1990年")
    assert found == dict(exact_match=0, f1=0, f1_mlqa=1), "the first answer; MLQA's rules take any"


# ---------------------------------------------------------------------------------- likelihoods

class Letters:
    """A tokenizer whose ids are letters from U+4E00 on; " c" is one token."""
    bos_id, size = 1, 120

    def encode(self, texts):
        return [[90 if part == " c" else ord(part) - 0x4E00 for part in re.findall(" c|.", text)]
                for text in texts]

    def decode(self, ids):
        return "".join("\n" if i % 9 == 0 else chr(97 + i % 26) for i in ids)


def subject_of(folder, bos=()):
    """A Subject of a folder without a tokenizer."""
    subject = Subject.__new__(Subject)
    subject.model, subject.tokenizer, subject.bos = load(folder), Letters(), list(bos)
    return subject


def text_of_ids(ids):
    return "".join(chr(0x4E00 + i) for i in ids)


def slow(hf, context, choice):
    """log P of one choice in a pass of its own."""
    with torch.no_grad():
        logits = hf(torch.tensor([context + choice])).logits[0].float().log_softmax(-1)
    return sum(logits[len(context) - 1 + n, token].item() for n, token in enumerate(choice))


@pytest.mark.parametrize("name", ["llama2", "smollm2", "gemma2"])
def test_choices_in_one_pass_score_as_choices_one_by_one(family, name):
    folder, random = family(name), torch.Generator().manual_seed(3)
    asked = []
    for length, lengths in ((1, (9, 9, 9)), (12, (1, 1, 1, 1)), (20, (5, 1, 8)), (3, (2,))):
        ids = [torch.randint(3, 50, (n,), generator=random).tolist() for n in (length, *lengths)]
        asked.append((ids[0], ids[1:]))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked *= 3                                              # more than are computed in one pass
    items = [Item(text_of_ids(ids), list(map(text_of_ids, choices)), 0) for ids, choices in asked]
    found = log_likelihoods(subject_of(folder, bos=[1]), items)
    for lls, (context, choices) in zip(found, asked, strict=True):
        assert lls == pytest.approx([slow(hf, [1] + context, c) for c in choices], abs=1e-3)


def test_a_context_that_is_too_long_loses_its_beginning(family):
    subject, folder = subject_of(family("llama2")), family("llama2")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = subject.model.config.max_position_embeddings
    context, choice = [3 + n % 40 for n in range(room + 30)], [5, 6, 7, 8]
    with pytest.warns(UserWarning, match="prompts do not fit the model's positions"):
        [[found]] = log_likelihoods(subject, [Item(text_of_ids(context), [text_of_ids(choice)], 0)])
    kept = context[-(room + 1 - len(choice)):]              # the last id is predicted and not read
    assert found == pytest.approx(slow(hf, kept, choice), abs=1e-3)


def test_context_and_choice_are_encoded_together_and_split(family, monkeypatch):
    seen = []

    class Recorder(evaluation.Packed):
        def add(self, ids, depth, after=None):
            seen.append(ids)
            return super().add(ids, depth, after)
    monkeypatch.setattr(evaluation, "Packed", Recorder)
    a, b = text_of_ids([7]), text_of_ids([8])
    for context, choice, bos, expected in (
            (a, b + b, [1], [[1, 7], [8]]), (a + " ", "c" + b, [], [[7], [90]]),
            ("", " c" + b, [], [[1], [90]]), ("", " c" + b, [1], [[1], [90]])):
        log_likelihoods(subject_of(family("llama2"), bos), [Item(context, [choice], 0)])
        assert seen == expected, "a space goes to the choice; an empty context is BOS in any case"
        seen.clear()


@pytest.mark.filterwarnings("ignore:prompts do not fit")
def test_written_answers_are_transformers_greedy_text_up_to_the_end_of_the_line(family):
    folder, subject = family("llama2"), subject_of(family("llama2"))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = subject.model.config
    new = min(256, config.max_position_embeddings // 2)
    prompts = [[1, 4 + n, 30 - n] + [7] * n for n in range(20)] + [list(range(3, 40)) * 9]
    texts = subject.complete([text_of_ids(prompt) for prompt in prompts], 256, one_line=True)
    for prompt, text in zip(prompts, texts, strict=True):
        kept = prompt[-(config.max_position_embeddings - new):]
        out = hf.generate(torch.tensor([kept]), max_new_tokens=new, do_sample=False, pad_token_id=0)
        ids = out[0, len(kept):].tolist()
        end = next((n for n, i in enumerate(ids) if i in config.eos_ids), len(ids))
        assert text == Letters().decode(ids[:end]).split("\n")[0]
    assert len(set(texts)) > 5


# ------------------------------------------------------------------------- the harness's results

# The first items of tests/agree.py --freeze: what lm-evaluation-harness made of them, without text.
FROZEN = json.loads((Path(__file__).parent / "agreement.json").read_text())


def first_items(shared, task, folder, count=20):
    """Our first items of a task that the harness scored."""
    path = our_file(task, shared / "data" / "eval" / AGREED[task][0], folder)
    test = read_test(task, "zh", str(path))
    test.items = test.items[:count]
    return test


def test_the_harness_likelihoods_get_the_harness_scores():
    for name in ("xcopa_zh", "xnli_zh"):
        for item in FROZEN[name]["items"]:
            found = score_of(name[:-3], "zh", item["gold"], item["loglikelihoods"])
            assert found == {"acc": item["score"]}
    halves = FROZEN["truthfulqa_zh_mc1"]["items"], FROZEN["truthfulqa_zh_mc2"]["items"]
    for one, two in zip(*halves, strict=True):
        found = score_of("truthfulqa", "zh", one["gold"],
                         one["loglikelihoods"] + two["loglikelihoods"])
        assert found == dict(mc1=one["score"], mc2=pytest.approx(two["score"], abs=1e-6))
    for _, _, names in AGREED.values():
        assert [len(FROZEN[name]["items"]) for name in names] == [20] * len(names)


@pytest.mark.parametrize("task", AGREED)
def test_prompts_and_choices_are_the_harness_to_the_letter(shared, task, tmp_path):
    for n, item in enumerate(first_items(shared, task, tmp_path).items):
        halves = [item.choices]
        if task == "truthfulqa":
            halves = item.choices[:item.gold[0]], item.choices[item.gold[0]:]
        for name, choices in zip(AGREED[task][2], halves, strict=True):
            assert digest(item.context, *choices) == FROZEN[name]["items"][n]["asked"]


@pytest.mark.parametrize("task, count", dict(xcopa=20, xnli=6, truthfulqa=3, xquad=1).items())
def test_smollm2_scores_as_in_the_harness(shared, smollm2, task, count, tmp_path):
    subject = Subject(smollm2, torch.float32, "cpu")
    test = first_items(shared, task, tmp_path, count)
    for n, line in enumerate(evaluation.run_test(subject, test)):
        if task == "xquad":
            frozen = FROZEN["xquad_zh"]["items"][n]
            assert (digest(line["text"]), line["f1"]) == (frozen["said"], frozen["f1"])
            continue
        expected = []
        for name in AGREED[task][2]:
            expected += FROZEN[name]["items"][n]["loglikelihoods"]
        assert line["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------------------------------- files

def write(path, rows):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_squads_json_and_the_hubs_rows_are_the_same_item(tmp_path):
    answers = [dict(text="x", answer_start=0), dict(text="y", answer_start=1)]
    paragraph = dict(context="C.", qas=[dict(id="1", question="Q?", answers=answers)])
    squad = dict(version="1.1", data=[dict(title="t", paragraphs=[paragraph])])
    for name, rows in (("squad.json", [squad]), ("hub.jsonl", [QA]), ("array.json", [[QA]])):
        items = read_test("xquad", "en", write(tmp_path / name, rows)).items
        assert items == [make_item("xquad", "en", QA)], name


@pytest.mark.parametrize("task, lang, file, count", [
    ("xquad", "zh", "xquad/xquad.zh.json", 1190), ("xquad", "en", "xquad/xquad.en.json", 1190),
    ("xcopa", "zh", "xcopa/test.zh.jsonl", 500),
    ("truthfulqa", "zh", "m_truthfulqa/zh_validation.json", 788)])
def test_no_item_of_a_real_file_is_lost(shared, task, lang, file, count):
    test = read_test(task, lang, str(shared / "data" / "eval" / file))
    assert (len(test.items), test.warnings) == (count, [])


CHINESE = dict(context="法国的货币是欧元。", question="法国用什么货币？", answers=dict(text=["欧元"]))
ENGLISH = dict(context="The currency of France is the euro.", question="What is the currency of "
               "France?", answers=dict(text=["euro"]))


@pytest.mark.parametrize("task, lang, rows, texts", [
    ("xquad", "vi", [CHINESE] * 1190, ["the text does not look like Vietnamese"]),
    ("mlqa", "zh", [CHINESE] * 1190, ["1,190 items; published: 5,137"]),                # XQuAD
    ("xquad", "zh", [CHINESE] * 1190 + [ENGLISH] * 1190, ["2,380 items; published: 1,190"]),
    ("xquad", "zh", [ENGLISH], ["the text does not look like Chinese",
                                "1 items; published: 1,190"])])
def test_a_file_that_is_not_what_the_command_says_is_warned_of(task, lang, rows, texts, tmp_path,
                                                               capsys):
    path = write(tmp_path / "file.jsonl", rows)
    test = read_test(task, lang, path)
    assert test.warnings == [f"{path}: {text}" for text in texts]
    assert capsys.readouterr().err.splitlines() == [f"warning: {path}: {text}" for text in texts]


WRONG = [
    ("xnli", {**NLI, "premise": None}, "'premise' is null, expected text"),
    ("xnli", {**NLI, "label": 7}, "'label' is 7, expected 0, 1, 2, entailment"),
    ("xnli", {**NLI, "label": "x"}, "'label' is \"x\", expected 0, 1, 2, entailment"),
    ("xnli", {**NLI, "label": True}, "'label' is true, expected 0, 1, 2, entailment"),
    ("xcopa", {**COPA, "label": 2}, "'label' is 2, expected 0, 1"),
    ("xcopa", {**COPA, "question": "why"}, "'question' is \"why\", expected cause, effect"),
    ("truthfulqa", {**MC, "mc1_targets": dict(choices=["a"], labels=[1, 0])}, "mc1_targets: exp"),
    ("truthfulqa", {**MC, "mc1_targets": dict(choices="ab", labels=[1, 0])}, "found \"ab\""),
    ("mlqa", {**QA, "question": " \n"}, "'question' is blank"),
    ("xcopa", {**COPA, "choice2": " "}, "'choice2' is blank"),
    ("truthfulqa", {**MC, "mc1_targets": dict(choices=["a", "b"], labels=[0, 1])},
     "expected the first choice to be the only right one"),
    ("mlqa", {**QA, "answers": dict(text="x")}, "found \"x\", expected a list of texts"),
    ("xquad", {**QA, "answers": dict(text=[])}, "found .., expected a list of texts"),
    ("xquad", {**QA, "answers": dict(text=[None])}, "found .null., expected a list of texts"),
    ("xquad", dict(context="C.", question="Q?"), "not an item .*'answers'.*its keys: .\"context\"")]


@pytest.mark.parametrize("task, row, message", WRONG)
def test_a_malformed_row_is_refused_with_its_line(task, row, message, tmp_path):
    right = dict(xnli=NLI, xcopa=COPA, truthfulqa=MC).get(task, QA)
    with pytest.raises(InputError, match=f"file.jsonl:2: .*{message}"):
        read_test(task, "zh", write(tmp_path / "file.jsonl", [right, row]))


@pytest.mark.parametrize("name, text", [
    ("wrong.jsonl", '{"this": 1}\n'), ("wrong.csv", "x,y\n1,2\n"), ("empty.json", "[]"),
    ("half.json", '{"data": [{"par'), ("binary.jsonl", "\udcff"), ("none.json", '{"data": []}'),
    ("squad.json", '{"data": [{"paragraphs": 1}]}')])
def test_a_wrong_file_is_refused_by_name(name, text, tmp_path):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=re.escape(name)):
        read_test("mlqa", "en", str(tmp_path / name))


# ---------------------------------------------------------------------------------- the command

def write_tasks(folder):
    """Arguments for two small tasks; the second is done twice."""
    xcopa = [dict(premise=f"他来了{n}。", choice1="好的。", choice2="不好。", question="cause",
                  label=n % 2) for n in range(5)]
    write(folder / "xcopa", xcopa)
    write(folder / "mlqa", [CHINESE] * 5)
    return [f"xcopa.zh={folder}/xcopa", f"mlqa.zh={folder}/mlqa", f"mlqa.zh={folder}/mlqa"]


def test_one_task_writes_its_scores_with_all_settings_and_every_item(tmp_path, capsys):
    write_tasks(tmp_path)
    out, items = tmp_path / "r.json", tmp_path / "items.jsonl"
    main(["--model", DEMO, "--task", "xcopa", "--lang", "zh", "--data", f"{tmp_path}/xcopa",
          "--limit", "4", "--out", str(out), "--items", str(items), "--bos", "never", "--template",
          "none", "--dtype", "fp32", "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    values = [line["acc"] for line in lines]
    mean, error = sum(values) / 4, torch.tensor(values).std().item() / 2
    accuracy = dict(mean=mean, stderr=pytest.approx(error), n=4)
    assert result == dict(
        task="xcopa", lang="zh", model=DEMO, data=f"{tmp_path}/xcopa", limit=4, bos=False, shots=0,
        dtype="float32", template="none", items_in_file=5, published_items=500,
        warnings=[f"{tmp_path}/xcopa: 5 items; published: 500"], scores=dict(acc=accuracy))
    assert printed == [f"warning: {result['warnings'][0]}", f"| test | items | {DEMO} |",
                       "| --- | --- | --- |",
                       f"| xcopa.zh acc | 4 | {100 * mean:.1f} ± {100 * error:.1f} |"]
    assert lines[0]["prompt"] == "他来了0 因为" and len(lines[0]["loglikelihoods"]) == 2


def test_several_models_and_tasks_give_one_table_and_one_list(tmp_path, capsys):
    tasks, out, other = write_tasks(tmp_path), tmp_path / "all.json", str(tmp_path / "other")
    Path(other).symlink_to(DEMO)
    main(["--model", DEMO, other, "--task", *tasks, "--template", "alpaca", "--out", str(out)])
    results, printed = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed[3:]]
    assert rows[0] == ["test", "items", DEMO, other]
    twice = ["mlqa.zh exact_match", "mlqa.zh f1"] * 2
    assert [row[0] for row in rows[2:]] == ["xcopa.zh acc", *twice]
    assert all(len(row) == 4 and row[2] == row[3] for row in rows[2:])
    assert [r["task"] for r in results] == ["xcopa", "mlqa", "mlqa"] * 2
    assert [r["template"] for r in results[:3]] == ["none", "alpaca", "alpaca"]
