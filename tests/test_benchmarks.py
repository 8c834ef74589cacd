"""The benchmarks: prompts to the letter, scores against slow references, files of every shape and wrong ones."""
import gzip
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
from eval import Item, matches, overlap, read_task, summary, words
from model import InputError, Tokens, load

# -------------------------------------------------------------------------------------- prompts

NLI = dict(premise="P.", hypothesis="H.", label=1)
GOLDEN = [
    ("xnli", "en", NLI, "", [" P., right? Yes, H.", " P., right? Also, H.", " P., right? No, H."], 1),
    ("xnli", "zh", NLI, "", [" P., 正确? 是的, H.", " P., 正确? 所以, H.", " P., 正确? 不是的, H."], 1),
    ("xnli", "vi", NLI, "", [" P., đúng? Vâng, H.", " P., đúng? Vì vậy, H.", " P., đúng? Không, H."], 1),
    ("xnli", "ar", NLI, "", [" P., صحيح? نعم, H.", " P., صحيح? لذا, H.", " P., صحيح? رقم, H."], 1),
    ("xcopa", "zh", dict(premise=" 他来了。", choice1="A.", choice2="B.", question="cause", label="1"),
     "他来了 因为", [" a.", " b."], 1),
    ("xcopa", "vi", dict(premise="Anh ấy đến.", choice1="Đó.", choice2="B", question="effect", label=0),
     "Anh ấy đến vì vậy", [" đó.", " b"], 0),
    ("xstorycloze", "zh", dict(input_sentence_1="一。", input_sentence_2="二。", input_sentence_3="三。",
                               input_sentence_4="四。", sentence_quiz1="甲", sentence_quiz2="乙",
                               answer_right_ending="2"), "一。 二。 三。 四。", [" 甲", " 乙"], 1),
    ("truthfulqa", "zh", dict(question=" 谁 [title]  [1]来了？", mc1_targets_choices=["甲", "乙"], mc1_targets_labels=[1, 0],
                              mc2_targets_choices=["甲", "丙", "乙"], mc2_targets_labels=[1, 1, 0]),
     evaluation.PRIMER + "\n\nQ: 谁.  来了？\nA:", [" 甲", " 乙", " 甲", " 丙", " 乙"], (2, [1, 1, 0])),
    ("mmlu", "en", dict(question=" Q? ", choices=["a", "b", "c", "d"], answer=2, subject="high_school_x"),
     "The following are multiple choice questions (with answers) about high school x.\n\n"
     "Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:", [" A", " B", " C", " D"], 2),
    ("mmlu", "vi", dict(question="Q?", choices=["a", "b", "c", "d"], answer="D"),
     "Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:", [" A", " B", " C", " D"], 3),
    *(("xquad", lang, dict(context="C.", question="Q?", answers=dict(text=["x", "y"])), prompt, [], ["x", "y"])
      for lang, prompt in dict(en="Context: C.\n\nQuestion: Q?\n\nAnswer:", zh="语境: C.\n\n问题: Q?\n\n回答:",
                               vi="Bối cảnh: C.\n\nCâu hỏi: Q?\n\nTrả lời:",
                               ar="سيا: C.\n\nسؤال: Q?\n\nإجابة:").items()),
    ("flores", "en-zh", dict(en="E.", zh="Z."), "English sentence: E.\nChinese sentence:", [], ["Z."]),
    ("flores", "ar-en", dict(en="E.", ar="A."), "Arabic sentence: A.\nEnglish sentence:", [], ["E."]),
    ("mlqa", "ar", dict(context="C.", question="Q?", answers=dict(text=["x"])),
     "Context: C.\n\nQuestion: Q?\n\nAnswer:", [], ["x"]),
    ("mkqa", "zh", dict(queries=dict(zh_cn="谁?"), answers=dict(zh_cn=[dict(text="甲", aliases=["乙"]),
                                                                    dict(text=None)])),
     "Question: 谁?\nAnswer:", [], ["甲", "乙", ""]),
]


@pytest.mark.parametrize("task, lang, row, context, choices, gold", GOLDEN, ids=lambda v: v if type(v) is str and
                         len(v) < 12 else "")
def test_prompts_to_the_letter(task, lang, row, context, choices, gold):
    assert evaluation.TASKS[task][0](row, lang) == Item(context, choices, gold)


# -------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("kind, lang, text, gold, exact, f1", [
    ("squad", "en", "The Cat!", "cat", 1, 1), ("squad", "en", "a cat and dog", "cat dog", 0, 0.8),
    ("squad", "zh", "1990年。", "1990年", 0, 0), ("mlqa", "zh", "1990年。", "1990年", 1, 1),
    ("mlqa", "zh", "北京城", "北京", 0, 0.8), ("mlqa", "vi", "của Pháp", "Pháp", 1, 1),
    ("squad", "vi", "của Pháp", "Pháp", 0, 2 / 3), ("mlqa", "ar", "البيت", "بيت", 1, 1),
    ("mlqa", "ar", "سؤال", "سؤ", 1, 1),                    # the official rule drops it inside words, too
    ("squad", "ar", "البيت", "بيت", 0, 0),
    ("mkqa", "zh", "北京 城", "北京", 0, 0.8), ("mkqa", "en", "the end", "end", 1, 1),
    ("squad", "en", "", "the", 1, 1), ("mlqa", "en", "", "the", 1, 0), ("mkqa", "en", "", "", 1, 1),
    ("squad", "en", "x", "", 0, 0), ("mkqa", "zh", "x", "", 0, 0)])
def test_exact_match_and_f1_of_each_benchmark(kind, lang, text, gold, exact, f1):
    assert matches(text, [gold], lang, kind) == (exact, pytest.approx(f1))
    assert matches(text, ["no such answer", gold], lang, kind)[1] == pytest.approx(f1), "the best of the accepted"


def test_xquad_takes_the_first_answer_and_reports_mlqas_f1_beside():
    score = evaluation.squad_match(Item("", [], ["甲", "1990年"]), " 1990年", "zh")
    assert score == dict(exact_match=0, f1=0, f1_mlqa=1)


def test_of_equal_choices_the_first_wins_and_truthfulqa_takes_the_share_of_the_true():
    assert evaluation.accuracy(Item("", [], 0), [-1.0, -1.0], "en") == {"acc": 1}
    assert evaluation.accuracy(Item("", [], 1), [-1.0, -1.0], "en") == {"acc": 0}
    two = [math.log(p) for p in (0.1, 0.2, 0.3, 0.1, 0.4)]
    assert evaluation.truth(Item("", [], (2, [1, 0, 1])), two, "en") == dict(mc1=0, mc2=pytest.approx(0.7 / 0.8))
    assert evaluation.truth(Item("", [], (1, [1, 0])), [-2000.0, -2001.0, -2000.0], "en")["mc2"] == pytest.approx(
        1 / (1 + math.e))                                                       # no underflow


def test_the_standard_error_is_the_sample_deviation_over_the_root_of_n():
    lines = [dict(acc=v, f1=None) for v in (1.0, 0.0, 0.0, 1.0)]
    assert summary(lines) == {"acc": dict(mean=0.5, stderr=pytest.approx(math.sqrt(0.25 / 3)), n=4)}


# -------------------------------------------------------------------------------------- likelihoods

def slow(hf, context, choice):
    """log P of one choice in a pass of its own."""
    with torch.no_grad():
        logits = hf(torch.tensor([context + choice])).logits[0].float().log_softmax(-1)
    return sum(logits[len(context) - 1 + n, token].item() for n, token in enumerate(choice))


@pytest.mark.parametrize("name", ["llama2", "smollm2", "gemma2"])
def test_choices_as_branches_score_as_choices_one_by_one(family, name):
    folder, random = family(name), torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 50, (n,), generator=random).tolist()
    asked = [(ids(n), [ids(m) for m in lengths]) for n, lengths in
             ((1, (9, 9, 9)), (12, (1, 1, 1, 1)), (20, (5, 1, 8)), (3, (2,)))]
    begin = ids(7)                                          # what choices begin with is computed once
    asked += [(ids(5), [begin + ids(2), begin, begin + ids(1), begin[:3] + ids(4)]), (ids(2), [begin] * 3)]
    model = load(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = [[slow(hf, context, choice) for choice in choices] for context, choices in asked]
    for budget in (1, 4096):                                # in batches of one, or all at once
        got = evaluation.log_likelihoods(model, asked, budget)
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_a_rank_without_items_has_nothing_to_score(family):
    assert evaluation.log_likelihoods(load(family("smollm2")), []) == []


def test_equal_choices_tie_exactly(family):
    model, (context, a, b) = load(family("smollm2")), ([1, 5, 6], [7, 8, 9], [10])
    found, = evaluation.log_likelihoods(model, [(context, [a, b, a, b, a])])
    assert len(set(found)) == 2 and found[0] == found[2] == found[4] and found[1] == found[3]


def test_likelihoods_add_up_along_a_choice(family):
    model, context, a, b = load(family("llama2")), [1, 5, 6], [7, 8], [9, 10, 11]
    (whole,), (first,), (rest,) = evaluation.log_likelihoods(model, [(context, [a + b]), (context, [a]),
                                                                     (context + a, [b])])
    assert whole == pytest.approx(first + rest, abs=1e-4)


def test_what_is_too_long_loses_its_beginning(family):
    model, hf = load(family("llama2")), AutoModelForCausalLM.from_pretrained(family("llama2"), dtype=torch.float32)
    room = model.config.max_positions
    context = [3 + n % 40 for n in range(room + 30)]
    long, short = [5, 6, 7, 8], [9]
    got = evaluation.log_likelihoods(model, [(context, [long, short])])[0]
    for value, choice in zip(got, (long, short)):
        kept = (context + choice)[-(room + 1):]             # the last one is predicted, and does not go in
        assert value == pytest.approx(slow(hf, kept[:-len(choice)], choice), abs=1e-3)


class Cipher:
    """Takes ids for text; decodes every id to a letter, some to a line's end."""
    size, bos_id = 120, 1

    def encode(self, prompts):
        return prompts

    def decode(self, ids):
        return "".join("\n" if i % 9 == 0 else chr(97 + i % 26) for i in ids)


def test_answers_are_transformers_greedy_text_up_to_the_end_of_the_line(family, capsys):
    folder, model = family("llama2"), load(family("llama2"))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    new = min(256, model.config.max_positions // 2)
    prompts = [[1, 4 + n, 30 - n] + [7] * n for n in range(20)] + [list(range(3, 40)) * 9]
    texts = evaluation.complete(model, Cipher(), prompts, bos=False, line=True)
    for prompt, text in zip(prompts, texts, strict=True):
        kept = prompt[-(model.config.max_positions - new):]
        out = hf.generate(torch.tensor([kept]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(kept):]
        ids = out.tolist()
        end = next((n for n, i in enumerate(ids) if i in model.config.eos_ids), len(ids))
        assert text == Cipher().decode(ids[:end]).split("\n")[0]
    assert len(set(texts)) > 5 and "1 of 21 prompts do not fit" in capsys.readouterr().out


class Letters:
    """A tokenizer of characters, but " c" is one token."""
    bos_id = 1

    def encode(self, texts):
        return [[99 if piece == " c" else ord(piece) for piece in re.findall(" c|.", text)] for text in texts]


def test_context_and_choice_are_encoded_together_and_split_by_the_contexts_length():
    tokens = Letters()
    (context, (one, two)), = evaluation.pairs(tokens, [Item("xa", ["b", " c"], 0)], bos=True)
    assert context == [1, ord("x"), ord("a")] and (one, two) == ([ord("b")], [99])
    (context, (one,)), = evaluation.pairs(tokens, [Item("x ", [" c"], 0)], bos=False)
    assert context == [ord("x")] and one == [32, 99], "the context's space goes to the choice"
    (context, (one,)), = evaluation.pairs(tokens, [Item("", [" c"], 0)], bos=False)
    assert context == [1] and one == [99], "an empty context is BOS whatever the mode"


# -------------------------------------------------------------------------------------- the harness's own

# The first items of tests/agree.py --freeze: what lm-evaluation-harness made of them, without their text.
FROZEN = json.loads((Path(__file__).parent / "agreement.json").read_text())


def items_of(shared, task):
    """Our items of a task that the harness scored."""
    return read_task([str(shared / "data" / "eval" / AGREED[task][0])], task, "zh")[:20]


def test_the_harness_likelihoods_get_the_harness_scores():
    for name in ("xcopa_zh", "xnli_zh"):
        for item in FROZEN[name]["items"]:
            found = evaluation.accuracy(Item("", [], item["gold"]), item["loglikelihoods"], "zh")
            assert found == {"acc": item["score"]}
    for one, two in zip(*(FROZEN[f"truthfulqa_zh_{mc}"]["items"] for mc in ("mc1", "mc2")), strict=True):
        found = evaluation.truth(Item("", [], one["gold"]), one["loglikelihoods"] + two["loglikelihoods"], "zh")
        assert found == dict(mc1=one["score"], mc2=pytest.approx(two["score"], abs=1e-6))
    assert all(len(FROZEN[name]["items"]) == 20 for _, _, names in AGREED.values() for name in names)
    assert all({item["score"] for item in FROZEN[name]["items"]} == {0, 1} for name in ("xcopa_zh", "xnli_zh"))


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
    model = load(smollm2)
    setting = dict(task=task, lang="zh", bos=evaluation.adds_bos(smollm2), template="none")
    for n, line in enumerate(evaluation.run_task(model, items_of(shared, task)[:count], setting)):
        if task == "xquad":
            frozen = FROZEN["xquad_zh"]["items"][n]
            assert (digest(line["text"]), line["f1"]) == (frozen["said"], frozen["f1"])
            continue
        expected = [ll for name in AGREED[task][2] for ll in FROZEN[name]["items"][n]["loglikelihoods"]]
        assert line["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


# -------------------------------------------------------------------------------------- files

SQUAD = dict(data=[dict(title="t", paragraphs=[dict(context="C.", qas=[
    dict(id="1", question="Q?", answers=[dict(text="x", answer_start=0), dict(text="y", answer_start=1)])])])])
MC = dict(question="Q?", mc1_targets=dict(choices=["a", "b"], labels=[1, 0]),
          mc2_targets=dict(choices=["a", "c", "b"], labels=[1, 1, 0]))
OWN = dict(question="Q?", mc1_targets=dict(a=1, b=0), mc2_targets=dict(a=1, c=1, b=0))
FLAT = dict(question="Q?", mc1_targets_choices=["a", "b"], mc1_targets_labels=[1, 0],
            mc2_targets_choices=["a", "c", "b"], mc2_targets_labels=[1, 1, 0])
STORY = {f"input_sentence_{n}": f"{n}." for n in (1, 2, 3, 4)} | dict(sentence_quiz1="a", sentence_quiz2="b",
                                                                     answer_right_ending=1)
ROCK = ("InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
        "RandomFifthSentenceQuiz2,AnswerRightEnding\nid,1.,2.,3.,4.,a,b,1\n")
SHAPES = {       # every group of files holds the same item
    ("xquad", "en"): {"squad.json": json.dumps(SQUAD), "hub.jsonl": json.dumps(
        dict(id="1", context="C.", question="Q?", answers=dict(text=["x", "y"], answer_start=[0, 1]))) + "\n"},
    ("xnli", "vi"): {"xtreme.tsv": 'P "x.\tH.\tneutral\n', "hub.jsonl": json.dumps(
        dict(premise='P "x.', hypothesis="H.", label=1)), "xnli.dev.tsv":
        "language\tgold_label\tsentence1\tsentence2\nar\tneutral\tA\tB\nvi\tneutral\tP \"x.\tH.\n"},
    ("truthfulqa", "en"): {"hub.jsonl": json.dumps(MC), "mc_task.json": json.dumps([OWN]),
                           "okapi.json": json.dumps([FLAT]), "TruthfulQA.csv":
                           "Type,Question,Best Answer,Correct Answers,Incorrect Answers\nt,Q?,a,a; c,b\n"},
    ("mmlu", "en"): {"a_b_test.csv": "Q?,1,2,3,4,C\n", "a_b_val.csv":
                     "question,choice0,choice1,choice2,choice3,answer\nQ?,1,2,3,4,2\n", "hub.jsonl": json.dumps(
                     dict(question="Q?", subject="a_b", choices=["1", "2", "3", "4"], answer=2))},
    ("mmlu", "zh"): {"okapi.json": json.dumps([dict(instruction="Q?", option_a="1", option_b="2", option_c="3",
                                                    option_d="4", answer="C")])},
    ("xstorycloze", "en"): {"hub.jsonl": json.dumps(STORY), "cloze.csv": ROCK, "x.tsv": ROCK.replace(",", "\t")},
    ("mkqa", "vi"): {"mkqa.jsonl": json.dumps(dict(queries=dict(vi="Q?"), answers=dict(vi=[dict(text="x")]))) + "\n"},
}


@pytest.mark.parametrize("task, lang", SHAPES)
def test_official_files_of_every_shape_give_the_same_item(task, lang, tmp_path):
    items = []
    for name, text in SHAPES[task, lang].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (name, f"{name}.gz"):
            items += read_task([str(tmp_path / path)], task, lang)
    assert len(items) == 2 * len(SHAPES[task, lang]) and all(item == items[0] for item in items), items
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in SHAPES[task, lang].items():
        (folder / name).write_text(text, encoding="utf-8")
    assert len(read_task([str(folder)], task, lang)) == len(SHAPES[task, lang])


@pytest.mark.parametrize("task, lang, file, count", [
    ("xquad", "zh", "xquad/xquad.zh.json", 1190), ("xquad", "en", "xquad/xquad.en.json", 1190),
    ("xnli", "zh", "xnli/dev-zh.tsv", 2490), ("xnli", "en", "xnli/dev-en.tsv", 2490),
    ("xcopa", "zh", "xcopa/test.zh.jsonl", 500), ("truthfulqa", "zh", "m_truthfulqa/zh_validation.json", 788),
    ("mlqa", "zh", "mlqa/dev-context-zh-question-zh.json", 504), ("mmlu", "en", "mmlu_en", 371),
    ("mlqa", "en", "mlqa/dev-context-en-question-en.json", 1148), ("mmlu", "zh", "m_mmlu/zh_val.json", 1421),
    ("mkqa", "ar", "mkqa/sample.jsonl", 5), ("xstorycloze", "en", "xstorycloze/story_cloze_sample.csv", 5),
    ("flores", "en-zh", "flores200", 1012)])
def test_no_item_of_a_real_file_is_lost(shared, task, lang, file, count):
    assert len(read_task([str(shared / "data" / "eval" / file)], task, lang)) == count
    whole = file.split("/")[0] not in ("mlqa", "mmlu_en", "m_mmlu", "mkqa", "xstorycloze")      # parts, those
    assert (evaluation.TASKS[task][3][lang] == count) == whole


def test_a_right_answer_that_is_none_of_the_choices_is_refused(tmp_path):
    for name, task, row in [("a.jsonl", "xnli", {**NLI, "label": 3}), ("b.jsonl", "xnli", {**NLI, "label": "-"}),
                            ("c.jsonl", "xstorycloze", {**STORY, "answer_right_ending": 0}),
                            ("d.jsonl", "mlqa", dict(context="C", question="Q", answers=dict(text=[])))]:
        (tmp_path / name).write_text(json.dumps(row))
        with pytest.raises(InputError, match=f"{name}:1: no item of {task} in en .*found the keys "):
            read_task([str(tmp_path / name)], task, "en")


def test_bos_is_what_transformers_tokenizer_of_the_folder_adds(tmp_path):
    assert evaluation.adds_bos(str(tmp_path))                                       # tokenizer.model alone
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(post_processor=None)))
    assert not evaluation.adds_bos(str(tmp_path))
    template = dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<s>", type_id=0))])
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(post_processor=template)))
    assert evaluation.adds_bos(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(add_bos_token=False)))
    assert not evaluation.adds_bos(str(tmp_path))


LANG = {"xcopa": "zh", "flores": "en-zh"}


@pytest.mark.parametrize("task", evaluation.TASKS)
def test_a_wrong_file_is_named_with_what_was_found_and_expected(task, tmp_path):
    for name, text in {"wrong.jsonl": '{"this": 1, "that": 2}\n', "wrong.csv": "x,y\n1,2\n", "empty.json": "[]",
                       "half.json": '{"data": [{"par', "text.jsonl": "hello", "zip.jsonl.gz": "no gzip",
                       "null.jsonl": "null", "squad.json": '{"data": [{"paragraphs": [{"context": 1}]}]}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_task([str(tmp_path / name)], task, LANG.get(task, "en"))
    with pytest.raises(InputError, match="no such|No such"):
        read_task([str(tmp_path / "gone.jsonl")], task, LANG.get(task, "en"))
