"""The benchmarks: prompts to the letter, scores against slow references, files of every kind."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from agree import TASKS as AGREED
from agree import digest
from transformers import AutoModelForCausalLM

import eval as evaluation
from eval import Item, Subject, log_likelihoods, main, make_item, matches, read_test, score, summary
from model import InputError, load

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")

# -------------------------------------------------------------------------------------- prompts

NLI = dict(premise="P", hypothesis="H", label=1)
QA = dict(context="C.", question="Q?", answers=dict(text=["x", "y"]))
MC = dict(question="Q?", mc1_targets=dict(choices=["a", "b"], labels=[1, 0]),
          mc2_targets=dict(choices=["a", "c", "b"], labels=[1, 1, 0]))
FLAT = dict(question=" 谁 [title]  [1]来了？", mc1_targets_choices=["甲", "乙"],
            mc1_targets_labels=[1, 0], mc2_targets_choices=["甲", "丙", "乙"],
            mc2_targets_labels=[1, 1, 0])
STORY = dict(input_sentence_1="一。", input_sentence_2="二。", input_sentence_3="三。",
             input_sentence_4="四。", sentence_quiz1="甲", sentence_quiz2="乙", answer_right_ending="2")
MMLU = dict(question=" Q? ", choices=["a", "b", "c", "d"], answer=2, subject="high_school_x")
MKQA = dict(queries=dict(zh_cn="谁?"), answers=dict(zh_cn=[dict(text="甲", aliases=["乙"]),
                                                         dict(text=None)]))
LETTERS = [" A", " B", " C", " D"]
GOLDEN = [
    ("xnli", "en", NLI, "", [" P, right? Yes, H", " P, right? Also, H", " P, right? No, H"], 1),
    ("xnli", "zh", NLI, "", [" P, 正确? 是的, H", " P, 正确? 所以, H", " P, 正确? 不是的, H"], 1),
    ("xnli", "vi", NLI, "", [" P, đúng? Vâng, H", " P, đúng? Vì vậy, H", " P, đúng? Không, H"], 1),
    ("xnli", "ar", NLI, "", [" P, صحيح? نعم, H", " P, صحيح? لذا, H", " P, صحيح? رقم, H"], 1),
    ("xcopa", "zh", dict(premise=" 他来了。", choice1="A.", choice2="B.", question="cause", label="1"),
     "他来了 因为", [" a.", " b."], 1),
    ("xcopa", "vi", dict(premise="Anh đến.", choice1="Đó.", choice2="B", label=0,
                         question="effect"),
     "Anh đến vì vậy", [" đó.", " b"], 0),
    ("xstorycloze", "zh", STORY, "一。 二。 三。 四。", [" 甲", " 乙"], 1),
    ("truthfulqa", "en", MC, evaluation.PRIMER + "\n\nQ: Q?\nA:", [" a", " b", " a", " c", " b"],
     [2, [1, 1, 0]]),
    ("truthfulqa", "zh", FLAT, evaluation.PRIMER + "\n\nQ: 谁.  来了？\nA:",
     [" 甲", " 乙", " 甲", " 丙", " 乙"], [2, [1, 1, 0]]),
    ("mmlu", "en", MMLU, "The following are multiple choice questions (with answers) about high "
     "school x.\n\nQ?\nA. a\nB. b\nC. c\nD. d\nAnswer:", LETTERS, 2),
    ("mmlu", "vi", {**MMLU, "answer": "D"}, "Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:", LETTERS, 3),
    ("xquad", "en", QA, "Context: C.\n\nQuestion: Q?\n\nAnswer:", [], ["x", "y"]),
    ("xquad", "zh", QA, "语境: C.\n\n问题: Q?\n\n回答:", [], ["x", "y"]),
    ("xquad", "vi", QA, "Bối cảnh: C.\n\nCâu hỏi: Q?\n\nTrả lời:", [], ["x", "y"]),
    ("xquad", "ar", QA, "سيا: C.\n\nسؤال: Q?\n\nإجابة:", [], ["x", "y"]),
    ("mlqa", "ar", QA, "Context: C.\n\nQuestion: Q?\n\nAnswer:", [], ["x", "y"]),
    ("mkqa", "zh", MKQA, "Question: 谁?\nAnswer:", [], ["甲", "乙", ""]),
    ("flores", "ar-en", dict(en="E", ar="A"), "Arabic sentence: A\nEnglish sentence:", [], ["E"]),
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
    ("mlqa", "ar", "مالك", "مالك بن أنس", 0, 0.5),         # an article inside a word stays,
    ("mkqa", "ar", "مالك", "مالك بن أنس", 0, 2 / 3),       # but MKQA's authors remove it there
    ("xquad", "en", "البيت", "بيت", 0, 0), ("mkqa", "zh", "北京 城", "北京", 0, 0.8),
    ("mkqa", "zh", "a1", "a", 0, 2 / 3), ("mkqa", "en", "the end", "end", 1, 1),
    ("xquad", "en", "", "the", 1, 1), ("mkqa", "en", "", "", 1, 1),
    ("xquad", "en", "x", "", 0, 0), ("mkqa", "zh", "x", "", 0, 0)])
def test_exact_match_and_f1_of_each_benchmark(rules, lang, text, gold, exact, f1):
    assert matches(rules, lang, text, [gold]) == dict(exact_match=exact, f1=pytest.approx(f1))
    best = matches(rules, lang, text, ["no such answer", gold])
    assert best["f1"] == pytest.approx(f1), "the best of the accepted answers"


def test_scores_of_an_item():
    assert score("xcopa", "zh", Item("", [], 0), [-1.0, -1.0]) == {"acc": 1}
    assert score("xcopa", "zh", Item("", [], 1), [-1.0, -1.0]) == {"acc": 0}
    both = [math.log(p) for p in (0.1, 0.2, 0.3, 0.1, 0.4)]
    expected = dict(mc1=0, mc2=pytest.approx(0.7 / 0.8))
    assert score("truthfulqa", "en", Item("", [], [2, [1, 0, 1]]), both) == expected
    far = score("truthfulqa", "en", Item("", [], [1, [1, 0]]), [-2000.0, -2001.0, -2000.0])
    assert far["mc2"] == pytest.approx(1 / (1 + math.e)), "no underflow"
    found = score("xquad", "zh", Item("", [], ["甲", "1990年。"]), " 1990年")
    assert found == dict(exact_match=0, f1=0, f1_mlqa=1), "the first answer; MLQA's rules take any"


def test_the_standard_error_is_the_sample_deviation_over_the_root_of_n():
    lines = [dict(acc=v, text="x") for v in (1.0, 0.0, 0.0, 1.0)]
    expected = dict(mean=0.5, stderr=pytest.approx(math.sqrt(0.25 / 3)), n=4)
    assert summary("xcopa", "zh", lines) == {"acc": expected}


def test_mkqas_headline_is_its_authors_best_f1():
    """Their script walks through the questions in order and keeps the best sum; it begins with no
    answer to any: 2 of 5 right. By hand: 2, 2.5, 1.5, 1.5, 2.5, 3.5 of 5."""
    lines = []
    for gold, text in ((["a b c"], "a"), ([""], "x"), ([""], ""), (["a"], "a"), (["b"], "b")):
        lines.append(dict(text=text, gold=gold, **score("mkqa", "vi", Item("", [], gold), text)))
    found = summary("mkqa", "vi", lines)
    assert found["best_f1"] == dict(mean=pytest.approx(3.5 / 5), n=5)
    assert found["f1"]["mean"] == pytest.approx(3.5 / 5)
    wrong = [dict(line, text="z", f1=0.0) for line in lines]
    assert summary("mkqa", "vi", wrong)["best_f1"]["mean"] == pytest.approx(2 / 5)


def test_chrf_and_bleu_are_sacrebleus_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="FLORES needs: pip install sacrebleu")
    pairs = [("The cat sat on a mat.", "the cat sits on the mat"), ("", "x"),
             ("猫坐在垫子上。", "一只猫 坐在垫子上"), ("a", "a")]
    texts, golds = zip(*pairs)
    lines = [dict(text=f" {text}", gold=[gold]) for text, gold in pairs]
    for lang, split in (("en-zh", "zh"), ("zh-en", "13a")):
        found = summary("flores", lang, lines)
        bleu = sacrebleu.corpus_bleu(texts, [golds], tokenize=split).score / 100
        chrf = sacrebleu.corpus_chrf(texts, [golds]).score / 100
        assert found["chrf"]["mean"] == pytest.approx(chrf)
        assert (found["bleu"]["mean"], found["bleu"]["tokenizer"]) == (pytest.approx(bleu), split)


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
    subject.alpaca = False
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
    items = [Item(text_of_ids(ids), list(map(text_of_ids, choices)), 0) for ids, choices in asked]
    for budget in (1, 4096):                                # in batches of one, and all at once
        found = log_likelihoods(subject_of(folder, bos=[1]), items, budget)
        for lls, (context, choices) in zip(found, asked, strict=True):
            assert lls == pytest.approx([slow(hf, [1] + context, c) for c in choices], abs=1e-3)


def test_a_context_that_is_too_long_loses_its_beginning(family):
    subject, folder = subject_of(family("llama2")), family("llama2")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = subject.model.config.max_position_embeddings
    context, choice = [3 + n % 40 for n in range(room + 30)], [5, 6, 7, 8]
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


def items_of(shared, task):
    """Our items of a task that the harness scored."""
    return read_test(task, "zh", str(shared / "data" / "eval" / AGREED[task][0]))[1][:20]


def test_the_harness_likelihoods_get_the_harness_scores():
    for name in ("xcopa_zh", "xnli_zh"):
        for item in FROZEN[name]["items"]:
            found = score(name[:-3], "zh", Item("", [], item["gold"]), item["loglikelihoods"])
            assert found == {"acc": item["score"]}
    halves = (FROZEN[f"truthfulqa_zh_{mc}"]["items"] for mc in ("mc1", "mc2"))
    for one, two in zip(*halves, strict=True):
        found = score("truthfulqa", "zh", Item("", [], one["gold"]),
                      one["loglikelihoods"] + two["loglikelihoods"])
        assert found == dict(mc1=one["score"], mc2=pytest.approx(two["score"], abs=1e-6))
    for _, _, names in AGREED.values():
        assert [len(FROZEN[name]["items"]) for name in names] == [20] * len(names)


@pytest.mark.parametrize("task", AGREED)
def test_prompts_and_choices_are_the_harness_to_the_letter(shared, task):
    for n, item in enumerate(items_of(shared, task)):
        halves = [item.choices]
        if task == "truthfulqa":
            halves = item.choices[:item.gold[0]], item.choices[item.gold[0]:]
        for name, choices in zip(AGREED[task][2], halves, strict=True):
            assert digest(item.context, *choices) == FROZEN[name]["items"][n]["asked"]


@pytest.mark.parametrize("task, count", dict(xcopa=20, xnli=6, truthfulqa=3, xquad=1).items())
def test_smollm2_scores_as_in_the_harness(shared, smollm2, task, count):
    subject, items = Subject(smollm2, torch.float32, "cpu"), items_of(shared, task)[:count]
    lines = evaluation.run_test(subject, task, "zh", items)
    for n, line in enumerate(lines):
        if task == "xquad":
            frozen = FROZEN["xquad_zh"]["items"][n]
            assert (digest(line["text"]), line["f1"]) == (frozen["said"], frozen["f1"])
            continue
        expected = []
        for name in AGREED[task][2]:
            expected += FROZEN[name]["items"][n]["loglikelihoods"]
        assert line["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------------------------------- files

SQUAD = dict(data=[dict(title="t", paragraphs=[dict(context="C.", qas=[
    dict(id="1", question="Q?", answers=[dict(text="x"), dict(text="y")])])])])
OKAPI = dict(instruction="Q?", option_a="1", option_b="2", option_c="3", option_d="4", answer="C")
KINDS = {                   # every group of files holds the same item
    ("xquad", "en"): {"squad.json": json.dumps(SQUAD), "hub.jsonl": json.dumps(QA) + "\n"},
    ("xnli", "vi"): {"xtreme.tsv": 'P "x.\tH\tneutral\n',
                     "hub.jsonl": json.dumps({**NLI, "premise": 'P "x.'})},
    ("truthfulqa", "zh"): {"okapi.json": json.dumps([FLAT]), "hub.jsonl": json.dumps(FLAT)},
    ("mmlu", "en"): {"a_b_test.csv": "Q?,1,2,3,4,C\n",
                     "a_b_val.csv": "question,choice0,choice1,choice2,choice3,answer\n"
                                     "Q?,1,2,3,4,2\n",
                     "hub.jsonl": json.dumps({**MMLU, "subject": "a_b", "choices": list("1234")})},
    ("mmlu", "zh"): {"okapi.json": json.dumps([OKAPI])},
    ("mkqa", "zh"): {"mkqa.jsonl": json.dumps(MKQA) + "\n"},
}


@pytest.mark.parametrize("task, lang", KINDS)
def test_files_of_every_kind_and_folders_of_them_give_the_same_item(task, lang, tmp_path):
    items = []
    for name, text in KINDS[task, lang].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        items += read_test(task, lang, str(tmp_path / name))[1]
    items += read_test(task, lang, str(tmp_path))[1]
    assert len(items) == 2 * len(KINDS[task, lang]) and all(item == items[0] for item in items)


@pytest.mark.parametrize("task, lang, file, count", [
    ("xquad", "zh", "xquad/xquad.zh.json", 1190), ("xquad", "en", "xquad/xquad.en.json", 1190),
    ("xnli", "zh", "xnli/dev-zh.tsv", 2490), ("xnli", "en", "xnli/dev-en.tsv", 2490),
    ("xcopa", "zh", "xcopa/test.zh.jsonl", 500),
    ("truthfulqa", "zh", "m_truthfulqa/zh_validation.json", 788), ("mmlu", "en", "mmlu_en", 371),
    ("mlqa", "zh", "mlqa/dev-context-zh-question-zh.json", 504),
    ("mkqa", "ar", "mkqa/sample.jsonl", 5), ("mmlu", "zh", "m_mmlu/zh_val.json", 1421)])
def test_no_item_of_a_real_file_is_lost_and_parts_are_warned_of(shared, task, lang, file, count):
    test, items = read_test(task, lang, str(shared / "data" / "eval" / file))
    assert len(items) == test["items_in_file"] == count
    whole = file.split("/")[0] not in ("mlqa", "mmlu_en", "m_mmlu", "mkqa")
    assert bool(test["warnings"]) != whole
    assert whole or f"{count:,} items; published: " in test["warnings"][0]


def test_flores_is_read_from_two_files_and_json_is_never_a_sentence(tmp_path, shared):
    zh, en = tmp_path / "zh", tmp_path / "en"
    texts = ["欧元是法国的货币。", "[1] 你好"], ["The euro is French.", "Hello"]
    for form in (str, lambda text: json.dumps(dict(id=1, text=text))):
        for file, lines in zip((zh, en), texts):
            file.write_text("\n".join(map(form, lines)) + "\n", encoding="utf-8")
        items = read_test("flores", "zh-en", str(zh), str(en))[1]
        prompt = f"Chinese sentence: {texts[0][0]}\nEnglish sentence:"
        assert len(items) == 2 and items[0] == Item(prompt, [], [texts[1][0]])
    with pytest.raises(InputError, match="expected --data FILE and --data_en FILE"):
        read_test("flores", "zh-en", str(zh))
    zh.write_text("one\n")
    with pytest.raises(InputError, match="1 and 2 sentences, expected equally many"):
        read_test("flores", "zh-en", str(zh), str(en))
    zh.write_text('{"id": 1, "sentence": "x"}\n')
    with pytest.raises(InputError, match="zh:1: 'text' is missing"):
        read_test("flores", "zh-en", str(zh), str(en))
    files = [str(shared / "data" / "eval" / "flores200" / f"{name}.devtest")
             for name in ("zho_Hans", "eng_Latn")]
    test, items = read_test("flores", "en-zh", *files)
    assert len(items) == 1012 and test["warnings"] == []


@pytest.mark.parametrize("task, lang, row, text", [
    ("xnli", "zh", dict(premise="Anh ấy đến.", hypothesis="Không.", label=0), "look like Chinese"),
    ("xnli", "en", dict(premise="Anh ấy đến.", hypothesis="Không.", label=0), "look like English")])
def test_a_file_that_is_not_what_the_command_says_is_warned_of(task, lang, row, text, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 3))
    language, size = read_test(task, lang, str(path))[0]["warnings"]
    assert text in language and size == f"{path}: 3 items; published: 2490"


def test_a_right_answer_that_is_none_of_the_choices_is_refused(tmp_path):
    for name, task, row in [("a.jsonl", "xnli", {**NLI, "label": 3}),
                            ("b.jsonl", "xnli", {**NLI, "label": "-"}),
                            ("c.jsonl", "xstorycloze", {**STORY, "answer_right_ending": 0}),
                            ("d.jsonl", "mlqa", {**QA, "answers": dict(text=[])})]:
        (tmp_path / name).write_text(json.dumps(row))
        with pytest.raises(InputError, match=f"{name}:1: not an item of {task} in en .*its keys: "):
            read_test(task, "en", str(tmp_path / name))


@pytest.mark.parametrize("task", evaluation.TASKS)
def test_a_wrong_file_is_named_with_what_was_found(task, tmp_path):
    lang = next(iter(evaluation.TASKS[task]))
    for name, text in {"wrong.jsonl": '{"this": 1, "that": 2}\n', "wrong.csv": "x,y\n1,2\n",
                       "empty.json": "[]", "half.json": '{"data": [{"par', "binary.jsonl": "\udcff",
                       "null.jsonl": "null", "squad.json": '{"data": [{"paragraphs": 1}]}'}.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
        path = str(tmp_path / name)
        if task != "flores" or name not in ("wrong.csv", "empty.json", "null.jsonl"):
            with pytest.raises(InputError, match=re.escape(name)):
                read_test(task, lang, path, path)
    with pytest.raises(InputError, match="gone.jsonl: No such file"):
        read_test(task, lang, str(tmp_path / "gone.jsonl"), str(tmp_path / "gone.jsonl"))


# ---------------------------------------------------------------------------------- the command

def write_tasks(folder):
    """Arguments for three small tasks."""
    xcopa = [dict(premise=f"他来了{n}。", choice1="好的。", choice2="不好。", question="cause",
                  label=n % 2) for n in range(5)]
    for name, rows in (("xcopa", xcopa), ("mkqa", [MKQA] * 3), ("xnli", [NLI] * 4)):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return [f"xcopa.zh={folder}/xcopa", f"mkqa.zh={folder}/mkqa", f"xnli.en={folder}/xnli"]


def test_one_task_writes_its_scores_with_all_settings_and_every_item(tmp_path, capsys):
    write_tasks(tmp_path)
    out, items = tmp_path / "r.json", tmp_path / "items.jsonl"
    main(["--model", DEMO, "--task", "xcopa", "--lang", "zh", "--data", f"{tmp_path}/xcopa",
          "--limit", "4", "--out", str(out), "--items", str(items), "--bos", "never", "--template",
          "none", "--dtype", "fp32", "--device", "cpu"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    lines = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    accuracy = result.pop("scores")["acc"]
    assert accuracy["n"] == 4 and accuracy["mean"] == sum(line["acc"] for line in lines) / 4
    assert result == dict(
        task="xcopa", lang="zh", model=DEMO, data=f"{tmp_path}/xcopa", data_en=None, limit=4,
        bos=False, dtype="fp32", template="none", shots=0, items_in_file=5, published_items=500,
        spec="lm-evaluation-harness 0.4.13",
        warnings=[f"{tmp_path}/xcopa: 5 items; published: 500"])
    assert printed.startswith(f"warning: {result['warnings'][0]}\n| model | xcopa.zh acc |\n")
    assert f"| {DEMO} | {100 * accuracy['mean']:.2f} ± {100 * accuracy['stderr']:.2f} |" in printed
    assert lines[0]["prompt"] == "他来了0 因为" and len(lines[0]["loglikelihoods"]) == 2


def test_several_models_and_tasks_give_one_table_and_one_list(tmp_path, capsys):
    tasks, out = write_tasks(tmp_path), tmp_path / "all.json"
    main(["--model", DEMO, DEMO, "--task", *tasks, "--template", "alpaca", "--out", str(out)])
    results, printed = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert ("| model | xcopa.zh acc | mkqa.zh exact_match | mkqa.zh f1 | mkqa.zh best_f1 | "
            "xnli.en acc |") in printed
    assert sum(line.startswith(f"| {DEMO} |") for line in printed) == 2
    assert [r["task"] for r in results] == ["xcopa", "mkqa", "xnli"] * 2
    assert [r["template"] for r in results[:3]] == ["none", "alpaca", "none"]
