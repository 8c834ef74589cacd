"""eval.py: what a model can do, and what goes on inside it.

    python eval.py --model runs/NAME/model --prompt "法国使用什么货币？"            one answer
    python eval.py --model runs/NAME/model                                      an answer to every line typed
    python eval.py --model runs/NAME/model --data demo/test.jsonl               exact match by language
    python eval.py --model DIR --task xcopa --lang zh --data test.zh.jsonl      a benchmark of the paper
    torchrun --nproc_per_node 8 eval.py --suite suite.toml                      many, as the paper's tables
    python eval.py --model BEFORE AFTER --task lens --data zh.jsonl --plot lens.png

The benchmarks are read from their official files, or from JSONL with the hub's field names:

    xnli xcopa xstorycloze truthfulqa mmlu     by likelihood: which choice does the model find likeliest
    xquad mlqa mkqa flores                     by generation: greedy, up to the end of the line

Prompts, truncation and scores are those of lm-evaluation-harness 0.4.13, its mistakes included, so that
numbers compare (tests/agree.py shows item by item that they do); MKQA, which it lacks, is scored as its
authors do, FLORES (--lang en-zh, zh-en ...) by chrF, and by BLEU where sacrebleu is installed. Three tasks
look inside, at one model, or at two, before and after; --plot draws them where matplotlib is installed:

    lens         parallel records: entropy of the logit lens by layer, its drops, i and j, the English pivot
    align        FLORES: how near the states of a sentence and of its translation are, by layer
    fertility    FLORES: tokens that a language costs, to English

A suite is TOML, and goes on where it was stopped:

    out = "runs/suite"
    [models]
    TFT = "runs/tft/model"
    DFT-logits = "runs/dft/model"
    [tasks]
    xquad.zh = "xquad.zh.json"
    flores.en-zh = ["zho_Hans.devtest", "eng_Latn.devtest"]
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import statistics
import string
import sys
import tomllib
import unicodedata

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import KEYS, Tokenizer, make_records, need, prompt_text, read_parallel, read_rows, read_text
from dft import choose_layers, lens, pool
from model import (Config, InputError, Tokens, Transformer, decode, generate, load, read_json,
                   write_json)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPEC = "lm-evaluation-harness 0.4.13"
NEW_TOKENS = 256                # of a generated answer, at most
CACHED = 2 ** 15                # tokens whose keys and values are held while texts are continued
RANK, WORLD = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))      # torchrun's
say = print if RANK == 0 else lambda *_: None


# ------------------------------------------------------------------------------------------- the tasks

@dataclasses.dataclass
class Item:
    """One question. With choices: which is likeliest behind the context; without: what is generated there."""
    context: str
    choices: list                   # with the space that stands before them
    gold: object                    # the right choice; of truthfulqa see there; else all accepted answers


XNLI = {"en": ("right", "Yes", "Also", "No"), "zh": ("正确", "是的", "所以", "不是的"),
        "vi": ("đúng", "Vâng", "Vì vậy", "Không"),
        "ar": ("\u0635\u062d\u064a\u062d", "\u0646\u0639\u0645", "\u0644\u0630\u0627", "\u0631\u0642\u0645")}
XCOPA = {"zh": {"cause": "因为", "effect": "所以"}, "vi": {"cause": "bởi vì", "effect": "vì vậy"}}
XQUAD = {"en": ("Context", "Question", "Answer"), "zh": ("语境", "问题", "回答"),
         "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"),
         "ar": ("\u0633\u064a\u0627", "\u0633\u0624\u0627\u0644", "\u0625\u062c\u0627\u0628\u0629")}
PRIMER = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


def xnli(row, lang):
    question, *words = XNLI[lang]
    label = row["label"]
    names = {"entailment": 0, "neutral": 1, "contradiction": 2, "contradictory": 2}
    return Item("", [f" {row['premise']}, {question}? {word}, {row['hypothesis']}" for word in words],
                names[label] if label in names else int(label))


def xcopa(row, lang):
    context = f"{row['premise'].strip()[:-1]} {XCOPA[lang][row['question']]}"
    choices = row["choice1"], row["choice2"]
    return Item(context, [f" {c[:1].lower()}{c[1:]}" for c in choices], int(row["label"]))


def xstorycloze(row, lang):
    context = " ".join(row[f"input_sentence_{n}"] for n in (1, 2, 3, 4))
    endings = [f" {row[f'sentence_quiz{n}']}" for n in (1, 2)]
    return Item(context, endings, int(row["answer_right_ending"]) - 1)


def truthfulqa(row, lang):
    """The choices of mc1, the first of which is right, then those of mc2; gold: how many mc1's are, and mc2's
    labels. As the hub has them, {choices, labels}; as m_truthfulqa has, apart; as its authors have, {choice:
    label}; or the columns of their TruthfulQA.csv."""
    if "Best Answer" in row:
        right, wrong = ([t.strip() for t in row[f"{kind} Answers"].split(";") if t.strip()]
                        for kind in ("Correct", "Incorrect"))
        question, mc1 = row["Question"], [row["Best Answer"].strip(), *wrong]
        mc2 = dict.fromkeys(right, 1) | dict.fromkeys(wrong, 0)
    else:
        question, mc1, mc2 = row["question"], *(row.get(f"mc{n}_targets") or dict(
            choices=row[f"mc{n}_targets_choices"], labels=row[f"mc{n}_targets_labels"]) for n in (1, 2))
        mc1 = mc1["choices"] if "choices" in mc1 else list(mc1)
    mc2 = mc2 if "choices" in mc2 else dict(choices=list(mc2), labels=list(mc2.values()))
    if lang != "en":
        question = (question or " ").strip().replace(" [title]", ". ")
        question = re.sub(r"\[.*?\]", "", question).replace("  ", " ")
    return Item(f"{PRIMER}\n\nQ: {question}\nA:", [f" {c}" for c in [*mc1, *mc2["choices"]]],
                (len(mc1), mc2["labels"]))


def mmlu(row, lang):
    head = ("" if lang != "en" else "The following are multiple choice questions (with answers) about "
            f"{row['subject'].replace('_', ' ')}.\n\n")
    choices = row["choices"] if "choices" in row else [row[f"option_{letter}"] for letter in "abcd"]
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    answer = row["answer"]
    return Item(f"{head}{row['question'].strip()}{options}\nAnswer:", [f" {letter}" for letter in "ABCD"],
                "ABCD".index(answer) if str(answer) in "ABCD" else int(answer))


def xquad(row, lang):
    c, q, a = XQUAD[lang]
    return Item(f"{c}: {row['context']}\n\n{q}: {row['question']}\n\n{a}:", [], row["answers"]["text"])


def mlqa(row, lang):
    return Item(f"Context: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer:", [],
                row["answers"]["text"])


def mkqa(row, lang):
    """No prompt is defined for it: this is ours. Accepted: every text and alias, "" where there is none."""
    lang = "zh_cn" if lang == "zh" else lang
    accepted = [t for a in row["answers"][lang] for t in (a["text"] or "", *(a.get("aliases") or ()))]
    return Item(f"Question: {row['queries'][lang]}\nAnswer:", [], accepted)


NAMES = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "ar": "Arabic"}
CODES = {"eng_Latn": "en", "zho_Hans": "zh", "vie_Latn": "vi", "arb_Arab": "ar"}            # FLORES' own


def flores(row, lang):
    source, target = lang.split("-")
    return Item(f"{NAMES[source]} sentence: {row[source]}\n{NAMES[target]} sentence:", [], [row[target]])


# ------------------------------------------------------------------------------------------- the scores

def accuracy(item, scores, lang):
    return {"acc": float(scores.index(max(scores)) == item.gold)}           # the first of equals wins


def truth(item, scores, lang):
    count, labels = item.gold
    mc1, mc2 = scores[:count], [math.exp(s - max(scores[count:])) for s in scores[count:]]
    return {"mc1": float(mc1.index(max(mc1)) == 0),
            "mc2": sum(p for p, true in zip(mc2, labels) if true) / sum(mc2)}


ARTICLES = {"en": r"\b(a|an|the)\b", "vi": r"\b(của|là|cái|chiếc|những)\b", "ar": r"\sال^|ال"}


def words(text: str, lang: str, kind: str) -> list:
    """The tokens that F1 counts. kind "squad": English rules for all languages; "mlqa": all of Unicode's
    punctuation goes, the language's articles, Chinese by the character; "mkqa": as mlqa, but ASCII
    punctuation alone, and in Chinese Latin letters by the character, too."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and not (
        kind == "mlqa" and unicodedata.category(c)[0] == "P"))
    articles = ARTICLES.get("en" if kind == "squad" else lang)
    text = re.sub(articles, " ", text) if articles else text
    if lang == "zh" and kind == "mkqa":
        return [c for c in text if not c.isspace()]
    if lang == "zh" and kind == "mlqa":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def overlap(a: list, b: list, kind: str) -> float:
    """F1 of two bags of words. Where one is empty: squad and mkqa ask whether both are, mlqa says 0."""
    if not a or not b:
        return float(a == b and kind != "mlqa")
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def matches(text: str, accepted: list, lang: str, kind: str) -> tuple:
    """(exact match, F1) with the best of the accepted answers."""
    pairs = [(words(text, lang, kind), words(gold, lang, kind)) for gold in accepted]
    return max(float(a == b) for a, b in pairs), max(overlap(a, b, kind) for a, b in pairs)


def squad_match(item, text, lang):
    """The harness's exact_match and f1, with the first answer alone; and f1_mlqa, by MLQA's rules."""
    exact, f1 = matches(text, item.gold[:1], lang, "squad")
    return {"exact_match": exact, "f1": f1, "f1_mlqa": matches(text.strip(), item.gold, lang, "mlqa")[1]}


def mlqa_match(item, text, lang):
    return dict(zip(("exact_match", "f1"), matches(text.strip(), item.gold, lang, "mlqa")))


def mkqa_match(item, text, lang):
    exact, f1 = matches(text.strip(), item.gold, lang, "mkqa")
    return {"em_all": exact, "f1_all": f1, "f1_answerable": f1 if any(item.gold) else None}


def ngrams(text: str, gold: str) -> list:
    """[(n-grams of text, of gold, in both)] for n = 1..6, of characters without spaces; sacrebleu counts none
    of the text where gold has none."""
    out, sides = [], ["".join(side.split()) for side in (text, gold)]
    for n in range(1, 7):
        a, b = (collections.Counter(t[k:k + n] for k in range(len(t) - n + 1)) for t in sides)
        out.append((a.total() if b else 0, b.total(), (a & b).total()))
    return out


def chrf(counts: list) -> float:
    """chrF2 of ngrams(), 0..1: recall counts four times as much as precision, both are means over n."""
    orders = [(both / a, both / b) for a, b, both in counts if a and b]
    precision, recall = (sum(v) / len(orders) for v in zip(*orders)) if orders else (0, 0)
    return 5 * precision * recall / (4 * precision + recall) if recall else 0.0


def translated(item, text, lang):
    return {"chrf_of_sentences": chrf(ngrams(text, item.gold[0]))}


def translation(lines: list, lang: str) -> dict:
    """Scores of a corpus, as sacrebleu defines them: chrF's counts are summed before they are divided."""
    texts, golds = [line["text"].strip() for line in lines], [line["gold"][0] for line in lines]
    counts = [[sum(n) for n in zip(*order)] for order in zip(*map(ngrams, texts, golds))]
    scores = dict(chrf=dict(mean=chrf(counts), n=len(lines)), **summary(lines))
    try:
        import sacrebleu
    except ImportError:
        say("note      no BLEU: sacrebleu is not installed")
        return scores
    split = "zh" if lang.endswith("zh") else "13a"          # its default, 13a, does not split Chinese
    bleu = sacrebleu.corpus_bleu(texts, [golds], tokenize=split).score / 100
    return dict(**scores, bleu=dict(mean=bleu, n=len(lines), tokenizer=split))


# task: (its item, its score, its split, how many items were published in each language)
TASKS = {
    "xnli": (xnli, accuracy, "validation", dict.fromkeys(("en", "zh", "vi", "ar"), 2490)),
    "xcopa": (xcopa, accuracy, "test", dict.fromkeys(("zh", "vi"), 500)),
    "xstorycloze": (xstorycloze, accuracy, "eval", dict.fromkeys(("en", "zh", "ar"), 1511)),
    "truthfulqa": (truthfulqa, truth, "validation", {"en": 817, "zh": 788, "vi": 785, "ar": 773}),
    "mmlu": (mmlu, accuracy, "test", {"en": 14042, "zh": None, "vi": None, "ar": None}),
    "xquad": (xquad, squad_match, "validation", dict.fromkeys(("en", "zh", "vi", "ar"), 1190)),
    "mlqa": (mlqa, mlqa_match, "test", {"en": 11590, "zh": 5137, "vi": 5495, "ar": 5335}),
    "mkqa": (mkqa, mkqa_match, "whole", dict.fromkeys(("en", "zh", "vi", "ar"), 10000)),
    "flores": (flores, translated, "devtest", dict.fromkeys(
        [f"{a}-{b}" for a in NAMES for b in NAMES if a != b and "en" in (a, b)], 1012)),
}
# The tasks whose answers are generated, and what becomes of an answer before it is compared.
WRITTEN = {"xquad": "SQuAD's English rules", "mlqa": "MLQA's official", "mkqa": "MKQA's official",
           "flores": "none"}
# The score of each task that a suite's tables show, and what the paper has there for LLaMA-2-7B.
TABLES = {"Table 1: generation": dict(xquad="f1", mlqa="f1", truthfulqa="mc1", mkqa="f1_all"),
          "Table 2: understanding": dict.fromkeys(("xnli", "xcopa", "xstorycloze", "mmlu"), "acc"),
          "Translation": dict(flores="chrf")}
PAPER = {
    "SFT": dict(
        xnli=dict(vi=36.59, ar=35.38, zh=36.39), xcopa=dict(vi=63.00, zh=65.00),
        xstorycloze=dict(ar=49.70, zh=59.56), mmlu=dict(vi=29.37, ar=27.60, zh=30.49)),
    "TFT": dict(
        xquad=dict(vi=27.36, ar=21.23, zh=23.41), mlqa=dict(vi=28.80, ar=21.62, zh=23.86),
        truthfulqa=dict(vi=28.54, ar=27.04, zh=26.40), mkqa=dict(vi=38.59, ar=35.02, zh=40.70),
        xnli=dict(vi=44.14, ar=33.73, zh=36.87), xcopa=dict(vi=66.00, zh=65.00),
        xstorycloze=dict(ar=57.51, zh=64.06), mmlu=dict(vi=33.23, ar=28.05, zh=32.34)),
    "DFT-logits": dict(
        xquad=dict(vi=29.65, ar=27.57, zh=24.77), mlqa=dict(vi=31.54, ar=28.26, zh=25.68),
        truthfulqa=dict(vi=28.64, ar=28.81, zh=28.93), mkqa=dict(vi=39.64, ar=35.84, zh=40.87),
        xnli=dict(vi=43.37, ar=34.06, zh=36.94), xcopa=dict(vi=66.20, zh=66.40),
        xstorycloze=dict(ar=58.78, zh=64.93), mmlu=dict(vi=32.60, ar=29.06, zh=33.19)),
    "DFT-feature": dict(
        xquad=dict(vi=28.27, ar=26.35, zh=24.34), mlqa=dict(vi=32.19, ar=29.51, zh=25.29),
        truthfulqa=dict(vi=30.45, ar=28.98, zh=27.79),
        xnli=dict(vi=43.50, ar=34.38, zh=37.64), xcopa=dict(vi=66.60, zh=68.60),
        xstorycloze=dict(ar=58.78, zh=64.40), mmlu=dict(vi=32.19, ar=28.86, zh=32.82)),
}


# ------------------------------------------------------------------------------------------- their files

def read_task(data: list, task: str, lang: str) -> list:
    """The Items of an official file, of JSONL with the hub's field names, or of a folder of such files; of
    flores see read_sentences."""
    path, items = data[0], []
    if lang not in TASKS[task][3]:
        raise InputError(f"--lang {lang}: {task} has {', '.join(TASKS[task][3])}")
    if len(data) > 1 and task != "flores":
        raise InputError(f"{data[1]}: {task} takes one file, or a folder of files")
    for file in [path] if task == "flores" else files_of(path):
        if task == "flores":
            texts = read_sentences(data, lang.replace("en", "").strip("-"))
            rows = [(f"{path}:{n}", dict(zip(texts, row))) for n, row in enumerate(zip(*texts.values()), 1)]
        else:
            rows = read_table(file) if re.search(r"\.[ct]sv(\.gz)?$", file) else read_json_rows(file)
        for place, row in rows:
            row = {FIELDS.get(key, key): value for key, value in row.items()}
            if row.get("language", lang) != lang:           # the original XNLI has all languages in one file
                continue
            if task == "mmlu":                              # its CSVs name the subject nowhere else
                row.setdefault("subject", re.sub(r"_(test|val|dev)\..*", "", os.path.basename(file)))
            try:
                item = TASKS[task][0](row, lang)
                if not item.choices and not item.gold or type(item.gold) is int and not (
                        0 <= item.gold < len(item.choices)):
                    raise ValueError(f"its right answer is {item.gold}")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise InputError(f"{place}: no item of {task} in {lang} ({type(error).__name__} {error}); "
                                 f"found the keys {', '.join(map(str, row))[:200]}") from None
            items.append(item)
    if not items:
        raise InputError(f"{path}: no item of {task} in {lang} in it")
    return items


def files_of(path: str) -> list:
    """The files of a folder, or the one file that path is."""
    if not os.path.isdir(path):
        return [path]
    names = [os.path.join(path, name) for name in sorted(os.listdir(path)) if not name.startswith(".")]
    return [name for name in names if os.path.isfile(name)]


def read_sentences(data: list, lang: str) -> dict:
    """{language: [sentence]}, parallel ones: of a folder of FLORES' files (zho_Hans.devtest ...), of one in
    `lang` and an English one, or of JSONL with the hub's sentence_zho_Hans ..."""
    if len(data) == 1 and not os.path.isdir(data[0]):
        rows = read_rows(data[0])
        out = {key[9:]: [need(place, row, key) for place, row in rows]
               for key in rows[0][1] if key.startswith("sentence_")}
    else:
        files = {lang: data[0], "en": data[1]} if len(data) == 2 else {
            os.path.basename(file).split(".")[0]: file for file in files_of(data[0])}
        out = {code: read_text(file).rstrip("\n").split("\n") for code, file in files.items()}
    if not out or len({len(texts) for texts in out.values()}) > 1:
        found = ", ".join(f"{code} {len(texts):,}" for code, texts in out.items()) or "none"
        raise InputError(f"{' '.join(data)}: expected equally many sentences in several languages, found "
                         f"{found}; give a folder of one split of FLORES, --data FILE --data_en FILE, or "
                         "JSONL with sentence_zho_Hans ...")
    return {CODES.get(code, code): texts for code, texts in out.items()}


# What official files call the fields that the hub has other names for.
FIELDS = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label", "instruction": "question",
          "AnswerRightEnding": "answer_right_ending", "RandomFifthSentenceQuiz1": "sentence_quiz1",
          "RandomFifthSentenceQuiz2": "sentence_quiz2",
          **{f"InputSentence{n}": f"input_sentence_{n}" for n in (1, 2, 3, 4)}}


def read_table(path: str) -> list:
    """[(place, {column: value})] of a CSV or TSV, with its header or with the columns that its kind has."""
    quoted = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if ".tsv" in path else {}
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline=""), **quoted))
    except csv.Error as error:
        raise InputError(f"{path}: not a table ({error})") from None
    names = rows[0] if rows else []
    if len(names) == 3 and "\t" in quoted.values():                                     # XTREME's XNLI
        names = ["premise", "hypothesis", "label"]
    elif len(names) == 6 and "answer_right_ending" not in names:                        # MMLU
        if rows[0][1:] in (["choice0", "choice1", "choice2", "choice3", "answer"], [*"ABCD", "Answer"]):
            rows[0] = []
        names = ["question", "option_a", "option_b", "option_c", "option_d", "answer"]
    return [(f"{path}:{n}", dict(zip(names, row))) for n, row in enumerate(rows, 1) if row and row != names]


def read_json_rows(path: str) -> list:
    """[(place, object)] of JSONL, a JSON array, or SQuAD's nested JSON; .gz or not."""
    text = read_text(path)
    if not text.lstrip().startswith("{") or "\n{" in text.strip():
        return read_rows(path)
    try:
        value = json.loads(text)
        if "data" not in value:
            return [(f"{path}:1", value)]
        return [(f"{path} {q['id']}", dict(context=p["context"], question=q["question"],
                                           answers=dict(text=[answer["text"] for answer in q["answers"]])))
                for a in value["data"] for p in a["paragraphs"] for q in p["qas"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: neither JSONL nor SQuAD's JSON ({type(error).__name__} {error})") from None


# ------------------------------------------------------------------------------------------- the model's part

def adds_bos(folder: str) -> bool:
    """Whether transformers' tokenizer of a folder puts BOS before a text."""
    path = os.path.join(folder, "tokenizer_config.json")
    said = read_json(path).get("add_bos_token") if os.path.exists(path) else None
    if isinstance(said, bool):
        return said
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        return True                                     # tokenizer.model alone: LLaMA-2, Gemma-2, LLaMA-3
    return '"SpecialToken"' in json.dumps(read_json(path).get("post_processor"))


def pairs(tokenizer: Tokenizer, items: list, bos: bool) -> list:
    """[(ids of the context, [ids of each choice])]: context and choice are encoded together, and the choice
    is what comes after as many tokens as the context has alone. An empty context is BOS."""
    moved = [(item.context.rstrip(), item.context[len(item.context.rstrip()):]) for item in items]
    contexts = tokenizer.encode([context for context, _ in moved])
    wholes = iter(tokenizer.encode([context + space + choice for (context, space), item in zip(moved, items)
                                    for choice in item.choices]))
    first = [tokenizer.bos_id] * bos
    return [(first + ids if item.context else [tokenizer.bos_id],
             [next(wholes)[len(ids):] for _ in item.choices]) for item, ids in zip(items, contexts)]


@torch.no_grad()
def log_likelihoods(model: Transformer, pairs: list, budget: int = 4096) -> list:
    """[[log P(choice | context), in nats, for each choice]], one pass an item: the context and what all
    choices begin with is the trunk of a row, the rest of them its branches, as in training. Softmax in fp32.
    What is longer than the model's positions is cut on the left."""
    asked, L, room, rows = pairs, model.config.num_layers, model.config.max_positions + 1, []
    # Equal choices of an item are computed once, so that they tie exactly.
    pairs = [(context, list(map(list, dict.fromkeys(map(tuple, choices))))) for context, choices in asked]
    for n, (context, choices) in enumerate(pairs):
        together = len(context) + max(map(len, choices)) <= room
        for group in [range(len(choices))] if together else [[c] for c in range(len(choices))]:
            kept = context[-max(1, room - max(len(choices[c]) for c in group)):]
            rows.append((n, kept, os.path.commonprefix([choices[c][:-1] for c in group]), group))
    tell_cut(len({n for n, kept, _, _ in rows if len(kept) < len(pairs[n][0])}), len(pairs))
    out = [[0.0] * len(choices) for _, choices in pairs]

    def size(row):
        n, context, begin, group = row
        return len(context) + len(begin) + sum(len(pairs[n][1][c]) - len(begin) for c in group)
    rows.sort(key=size, reverse=True)
    batches = [[]] if rows else []                          # a rank may have no item
    for row in rows:
        if batches[-1] and sum(map(size, batches[-1])) + size(row) > budget:
            batches.append([])
        batches[-1].append(row)
    for batch in tqdm(batches, desc="scoring", unit="batch", leave=False, disable=RANK):
        tokens = Tokens([[(context + begin, L), *((pairs[n][1][c][len(begin):-1], L) for c in group)]
                         for n, context, begin, group in batch])
        places, targets, owners = [], [], []            # where, what is predicted, for which choices
        for (n, context, begin, group), starts in zip(batch, tokens.starts):
            end = starts[0] + len(context) + len(begin) - 1
            places += range(end - len(begin), end)
            targets += begin
            owners += [(n, group)] * len(begin)
            for c, start in zip(group, starts[1:]):
                ids = pairs[n][1][c][len(begin):]
                places += [end, *range(start, start + len(ids) - 1)]
                targets += ids
                owners += [(n, [c])] * len(ids)
        x = model(tokens, (L,))[L]
        places, targets = (torch.tensor(t, device=x.device) for t in (places, targets))
        for a in range(0, len(owners), 256):
            logp = model.logits(x[places[a:a + 256]]).log_softmax(-1)                       # (<= 256, V)
            for (n, group), value in zip(owners[a:], logp.gather(1, targets[a:a + 256, None])[:, 0].tolist()):
                for c in group:
                    out[n][c] += value
    return [[found[pairs[n][1].index(ids)] for ids in asked[n][1]] for n, found in enumerate(out)]


def complete(model: Transformer, tokenizer: Tokenizer, texts: list, bos=True, new=NEW_TOKENS, line=False):
    """Greedy continuations of texts, as text: at most `new` tokens, and with `line` up to the line's end. A
    text that leaves no room for so many loses its beginning. Texts that begin alike come together, for
    decode() to read what they share once."""
    new = min(new, model.config.max_positions // 2)
    room = model.config.max_positions - new
    prompts = [[tokenizer.bos_id] * bos + ids for ids in tokenizer.encode(texts)]
    tell_cut(sum(len(prompt) > room for prompt in prompts), len(prompts))
    prompts = [prompt[-room:] for prompt in prompts]
    last = {n for n in range(tokenizer.size) if "\n" in tokenizer.decode([n])} if line else ()
    batches = [[]]
    for n in sorted(range(len(prompts)), key=prompts.__getitem__):
        if (len(batches[-1]) + 1) * (max(len(prompts[m]) for m in [*batches[-1], n]) + new) > CACHED:
            batches.append([])
        batches[-1].append(n)
    out = [""] * len(prompts)
    for batch in tqdm(batches, desc="answering", unit="batch", leave=False, disable=len(batches) < 2 or RANK):
        for n, ids in zip(batch, generate(model, [prompts[n] for n in batch], new, last=last)):
            out[n] = tokenizer.decode(ids)
    return [text.split("\n")[0] for text in out] if line else out


def tell_cut(cut: int, n: int) -> None:
    """Say how many prompts did not fit."""
    if cut:
        tqdm.write(f"note      {cut:,} of {n:,} prompts do not fit the model's positions: their beginnings "
                   "are cut")


# ------------------------------------------------------------------------------------------- benchmarks

def setting(a, folder: str, task: str, lang: str, data: list) -> dict:
    """What a score depends on, of one task in one language on one model: results.json without the scores."""
    bos = adds_bos(folder) if a.bos == "auto" else a.bos == "always"
    if Config.read(folder).gemma and not bos:
        raise InputError("--bos never: Gemma learnt with BOS before every text and breaks down without")
    alpaca = task in WRITTEN and uses_alpaca(a, folder)
    return dict(task=task, lang=lang, data=data, limit=a.limit, model=folder, bos=bos, dtype=a.dtype, shots=0,
                data_sha256=digest(file for path in data for file in files_of(path)),
                model_sha256=model_digest(folder), template="alpaca" if alpaca else "none",
                normaliser=WRITTEN.get(task), spec=SPEC)


def uses_alpaca(a, folder: str) -> bool:
    """Whether questions stand in the Alpaca template: by default, to the models that train.py made."""
    tuned = os.path.exists(os.path.join(os.path.dirname(os.path.normpath(folder)), "settings.json"))
    return a.template == "alpaca" or a.template is None and tuned


@functools.cache                                                            # it may be 14 GB to read
def model_digest(folder: str) -> str:
    """SHA-256 of what makes a model: config.json and the weights."""
    return digest(f for f in files_of(folder) if f.endswith((".safetensors", os.sep + "config.json")))


def digest(files) -> str:
    """SHA-256 of what is in files."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def benchmark(model: Transformer, items: list, s: dict, items_path: str | None) -> dict:
    """Do what setting() describes: that, and the scores. Each rank of torchrun takes every WORLD-th item."""
    _, _, split, counts = TASKS[s["task"]]
    published = counts[s["lang"]]
    if published != len(items):
        say(f"note      {s['data'][0]} has {len(items):,} items; the {split} split of {s['task']} in "
            f"{s['lang']} has {published or 'a number that we do not know'}")
        split = "unknown"
    mine = run_task(model, items[:s["limit"]][RANK::WORLD], s)
    parts = [mine] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, mine)
    lines = [part[n] for n in range(len(parts[0])) for part in parts if n < len(part)]
    if items_path and not RANK:
        with open(items_path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    scores = translation(lines, s["lang"]) if s["task"] == "flores" else summary(lines)
    return dict(**s, split=split, items_in_file=len(items), published_items=published, scores=scores)


def run_task(model: Transformer, items: list, s: dict) -> list:
    """[{prompt, what the model made of it, gold, the scores}] of each item."""
    tokenizer, score, lines = Tokenizer(model.config), TASKS[s["task"]][1], []
    if s["task"] not in WRITTEN:
        for item, found in zip(items, log_likelihoods(model, pairs(tokenizer, items, s["bos"]))):
            lines.append(dict(prompt=item.context, choices=item.choices, loglikelihoods=found, gold=item.gold,
                              **score(item, found, s["lang"])))
        return lines
    texts = [prompt_text(i.context, "") if s["template"] == "alpaca" else i.context for i in items]
    for item, prompt, text in zip(items, texts, complete(model, tokenizer, texts, s["bos"], line=True)):
        lines.append(dict(prompt=prompt, text=text, gold=item.gold, **score(item, text, s["lang"])))
    return lines


def summary(lines: list) -> dict:
    """{score: {mean, stderr, n}} over items."""
    out = {}
    for key in lines[0]:
        values = [line[key] for line in lines if isinstance(line[key], float)]
        if values:
            spread, n = statistics.stdev(values) if len(values) > 1 else 0.0, len(values)
            out[key] = dict(mean=statistics.fmean(values), stderr=spread / math.sqrt(n), n=n)
    return out


def suite(a) -> None:
    """Every task of a TOML file on every model of it, and the paper's tables of them."""
    try:
        spec = tomllib.loads(read_text(a.suite))
        asked = [(task, lang, [data] if isinstance(data, str) else list(data))
                 for task, files in spec["tasks"].items() for lang, data in files.items()]
        models, out = dict(spec["models"]), str(spec["out"])
        if not asked or not models or not {task for task, _, _ in asked} <= TASKS.keys():
            raise ValueError(f"tasks {', '.join(spec['tasks'])}; known: {', '.join(TASKS)}")
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{a.suite}: {error}; expected out = \"FOLDER\", [models] with TITLE = \"FOLDER\" "
                         "and [tasks] with TASK.LANGUAGE = \"FILE\"") from None
    os.makedirs(out, exist_ok=True)
    items = {(task, lang): read_task(data, task, lang) for task, lang, data in asked}
    plan = [(title, setting(a, folder, *one)) for title, folder in models.items() for one in asked]
    model, found = None, {}
    for title, s in plan:
        path = os.path.join(out, re.sub(r"[^\w-]+", "_", f"{title} {s['task']} {s['lang']}"))
        result = read_json(path + ".json") if os.path.exists(path + ".json") else {}
        kept = all(result.get(key) == value for key, value in s.items())
        if not kept:
            if not model or model.config.folder != s["model"]:
                model = None                                                # two would not fit
                model = load(s["model"], DTYPES[a.dtype], pick_device(a.device))
            result = benchmark(model, items[s["task"], s["lang"]], s, path + ".items.jsonl")
            if not RANK:
                write_json(result, path + ".json")
        found[title, s["task"], s["lang"]] = result["scores"]
        say(f"{'kept     ' if kept else 'measured '} {path}.json")
    for name, metrics in TABLES.items():
        columns = [(task, lang) for task, lang, _ in asked if task in metrics]
        if columns:
            rows = [[title, *(f"{100 * found[title, t, g][metrics[t]]['mean']:.2f}" for t, g in columns)]
                    for title in models]
            for arm, numbers in PAPER.items() if any(map(is_llama2_7b, models.values())) else ():
                cells = [numbers.get(t, {}).get(g, "") for t, g in columns]
                rows += [[f"{arm}, the paper", *cells]] if any(cells) else []
            say(f"\n{name}\n\n" + table(["", *(f"{t} {g}, {metrics[t]}" for t, g in columns)], rows))
    say(f"\nThe parts lie in {out}; the same command takes up what is there.")


def is_llama2_7b(folder: str) -> bool:
    """Whether a model has the shapes of LLaMA-2-7B, whose numbers in the paper we know."""
    c = Config.read(folder)
    return (c.model_type, c.hidden_size, c.num_layers, c.vocab_size) == ("llama", 4096, 32, 32000)


def table(head: list, rows: list) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


# ------------------------------------------------------------------------------------------- looking inside

def lens_of(folder: str, a) -> dict:
    """What the logit lens shows of a model, L + 1 numbers each: the mean entropy, in nats, over the queries'
    tokens in the target language and in English; where the target-language prompt ends, the mean probability
    of the first token of the English answer and of the target-language one, where they differ (the English
    pivot of Wendler et al. 2024); and "map", the entropies of the first query, (L + 1, tokens)."""
    model = load(folder, DTYPES[a.dtype], pick_device(a.device))
    rows = [(place, row) for place, row in read_parallel(a.data, a.data_en)
            if a.lang in (None, row.get("lang", a.lang)) and "output_en" in row]
    if not rows:
        raise InputError(f"{a.data}: no record with instruction_en, input_en and output_en"
                         + (f" and lang {a.lang}" if a.lang else ""))
    rows, found = rows[:a.limit or 32], dict(model=folder)
    for side, name in (("both", "entropy"), ("english", "entropy_en")):
        records, counts = make_records(rows, Tokenizer(model.config), side, 512)
        entropies, pivots = [], []
        for n in tqdm(range(0, len(records), 8), desc=name, unit="batch", leave=False):
            part = records[n:n + 8]
            tokens = Tokens.plain([r.prompt for r in part], model.config.num_layers)
            sizes = [r.query[1] - r.query[0] + 1 for r in part]             # a query, and the prompt's end
            places = [start + t for r, (start,) in zip(part, tokens.starts)
                      for t in (*range(*r.query), len(r.prompt) - 1)]
            first = torch.tensor([[r.answer[0], (r.answer_en or r.answer)[0]] for r in part])
            seen = lens(model, tokens, torch.tensor(places), first.repeat_interleave(torch.tensor(sizes), 0))
            for e, p, (target, english) in zip(*(s.split(sizes, 1) for s in seen), first):
                entropies.append(e[:, :-1])
                pivots += [p[:, -1]] if target != english else []           # (L + 1, 2)
        found[name] = torch.cat(entropies, 1).mean(1).tolist()
        if side == "both":
            found |= dict(records=str(counts), pivots=len(pivots), map=entropies[0].tolist())
            both = torch.stack(pivots).mean(0) if pivots else torch.full((len(e), 2), math.nan)
            found |= dict(p_target=both[:, 0].tolist(), p_english=both[:, 1].tolist())
    found["i"], found["j"], found["why"] = choose_layers(found["entropy"])
    return found


def lens_task(a) -> None:
    """--task lens: numbers by layer, and a picture of one model or two."""
    found = [lens_of(folder, a) for folder in a.model]
    for f in found:
        print(f"{f['model']}: {f['records']}; the answers' first tokens differ in {f['pivots']}\n")
        by_layer({"entropy": f["entropy"], "entropy, English prompts": f["entropy_en"],
                  "P(English answer)": f["p_english"], "P(target answer)": f["p_target"]})
        print(f"i = {f['i']}, j = {f['j']} of {len(f['entropy']) - 1} layers, as {f['why']}\n")
    with picture(a, found) as axes:
        top = max(max(map(max, f["map"])) for f in found)
        for f, (left, middle, right) in zip(found, axes):
            curves(left, "entropy of the lens", "entropy, nats",
                   {"target language": f["entropy"], "English": f["entropy_en"]})
            for key in "ij":
                left.axvline(f[key], color="grey", lw=0.8)
                left.text(f[key], left.get_ylim()[1], key, ha="center", va="bottom")
            image = middle.imshow(f["map"], aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=top)
            middle.figure.colorbar(image, ax=middle, label="entropy, nats")
            middle.set(xlabel="token of one query", ylabel="layer", title="entropy of one query\n")
            curves(right, "the answer's first token", "probability",
                   {"target language": f["p_target"], "English": f["p_english"]})


def by_layer(columns: dict) -> None:
    """Print a table of columns of L + 1 numbers."""
    print(table(["layer", *columns], [[k, *(f"{v:.3f}" for v in values)]
                                      for k, values in enumerate(zip(*columns.values()))]) + "\n")


@contextlib.contextmanager
def picture(a, found: list):
    """Write --out; with --plot, a grid to draw in, three places for each model, that becomes the picture."""
    if a.out:
        write_json(found, a.out)
        print(f"The numbers are in {a.out}")
    if not a.plot:
        yield []
        return
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    whole = pyplot.figure(figsize=(13.5, 4 * len(found)), dpi=72, layout="constrained")
    grid = []
    for f, part in zip(found, whole.subfigures(len(found), 1, squeeze=False)[:, 0]):
        part.suptitle(re.sub(r"/model$", "", os.path.normpath(f["model"])).split("/")[-1])
        grid.append(part.subplots(1, 3))
    yield grid
    whole.savefig(a.plot)
    print(f"The picture is {a.plot}")


def curves(axis, title: str, label: str, values: dict) -> None:
    """Two curves over the layers; told apart by colour, by mark and by line."""
    for (name, numbers), style in zip(values.items(), STYLES):
        axis.plot(numbers, label=name, ms=3, **style)
    axis.set(xlabel="layer", ylabel=label, title=title + "\n")
    axis.legend()


STYLES = dict(color="#D55E00", marker="o"), dict(color="#0072B2", marker="x", ls="--")


@torch.no_grad()
def vectors(model: Transformer, sentences: list):
    """Sentences -> (L + 1, n, D) fp32: after each layer, the mean over a sentence's tokens, but without BOS,
    whose state is many times longer than the others."""
    tokenizer, L, out = Tokenizer(model.config), model.config.num_layers, []
    texts = [ids[:model.config.max_positions - 1] for ids in tokenizer.encode(sentences)]
    for a in tqdm(range(0, len(texts), 16), desc="reading", unit="batch", leave=False):
        tokens = Tokens.plain([[tokenizer.bos_id] + ids for ids in texts[a:a + 16]], L)
        inner = tokens.pos > 0
        h = model(tokens, tuple(range(L + 1)))
        out.append(torch.stack([pool(h[k], inner.nonzero()[:, 0], tokens.row[inner]).cpu() for k in h]))
    return torch.cat(out, 1)


def align_task(a) -> None:
    """--task align: how near the states of a sentence and of its translation are, by layer."""
    sentences = read_sentences(a.data, a.lang or "target")
    lang = a.lang or next(iter(sorted(sentences.keys() - {"en"})), None)
    if not {"en", lang} <= sentences.keys():
        raise InputError(f"--task align needs {lang} and en; {' '.join(a.data)} has {', '.join(sentences)}")
    found, flat = [], []
    for folder in a.model:
        model = load(folder, DTYPES[a.dtype], pick_device(a.device))
        L = model.config.num_layers
        layer = a.layer if a.layer is not None else max(1, round(15 / 32 * L))
        if not 0 <= layer <= L:
            raise InputError(f"--layer {layer}: {folder} has layers 0 to {L}")
        both = [vectors(model, sentences[side][:a.limit]) for side in (lang, "en")]
        cos = F.normalize(both[0], dim=-1) @ F.normalize(both[1], dim=-1).transpose(1, 2)      # (L + 1, n, n)
        n, place = cos.shape[1], torch.arange(cos.shape[1])
        true = cos.diagonal(dim1=1, dim2=2).mean(1)
        random = (cos.sum((1, 2)) - n * true) / max(1, n * n - n)
        found.append(dict(model=folder, sentences=n, layer=layer, true=true.tolist(), random=random.tolist(),
                          to_english=(cos.argmax(2) == place).float().mean(1).tolist(),
                          from_english=(cos.argmax(1) == place).float().mean(1).tolist()))
        flat.append(F.normalize(torch.cat([v[layer] for v in both]), dim=-1))                   # (2n, D)
        print(f"{folder}: {n} sentences in {lang} and English\n")
        by_layer({"cosine of translations": found[-1]["true"], "of other pairs": found[-1]["random"],
                  f"{lang} finds English": found[-1]["to_english"],
                  f"English finds {lang}": found[-1]["from_english"]})
    with picture(a, found) as axes:
        for f, x, (left, middle, right) in zip(found, flat, axes):
            spots, method = project(x)
            for part, name, style in zip((spots[:n], spots[n:]), (lang, "English"), STYLES):
                left.plot(*part.T, label=name, ms=3, **style | dict(ls=""))
            left.set(xlabel=f"{method} 1", ylabel=f"{method} 2", title=f"sentences, layer {f['layer']}\n")
            left.legend()
            curves(middle, "nearness", "cosine", {"translations": f["true"], "other pairs": f["random"]})
            curves(right, "retrieval of translations", "share that is found",
                   {f"{lang} finds English": f["to_english"], f"English finds {lang}": f["from_english"]})


def project(x):
    """(m, D) -> (m, 2) and the method: t-SNE where scikit-learn is installed, as in the paper, else PCA."""
    try:
        from sklearn.manifold import TSNE
        return TSNE(perplexity=min(30, len(x) / 4), random_state=0).fit_transform(x.numpy()), "t-SNE"
    except ImportError:
        x = x - x.mean(0)
        return x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T, "PCA"


def fertility_task(a) -> None:
    """--task fertility: what a language costs in tokens."""
    tokenizer, rows = Tokenizer(Config.read(a.model[0])), []
    sentences = read_sentences(a.data, a.lang or "target")
    if "en" not in sentences:
        raise InputError(f"{' '.join(a.data)}: no English in it; found {', '.join(sentences)}")
    texts = {lang: texts[:a.limit] for lang, texts in sentences.items()}
    tokens = {lang: sum(map(len, tokenizer.encode(texts[lang]))) for lang in texts}
    for lang in texts:
        rows.append({"language": lang, "sentences": len(texts[lang]),
                     "tokens a sentence": round(tokens[lang] / len(texts[lang]), 2),
                     "tokens a character": round(tokens[lang] / sum(map(len, texts[lang])), 3),
                     "times English": round(tokens[lang] / tokens["en"], 3)})
    print(table(list(rows[0]), [row.values() for row in rows]))
    if a.out:
        write_json(rows, a.out)


LOOKS = {"lens": lens_task, "align": align_task, "fertility": fertility_task}


# ------------------------------------------------------------------------------------------- answers

def talk(a) -> None:
    """Answer --prompt, or every line of the terminal, letter by letter."""
    folder, = a.model
    model, alpaca = load(folder, DTYPES[a.dtype], pick_device(a.device)), uses_alpaca(a, folder)
    tokenizer = Tokenizer(model.config)
    print(folder, "answers, in the Alpaca template" if alpaca else "goes on with the text as it is",
          "" if a.prompt else "(one prompt a line, ^D ends)", file=sys.stderr)
    while True:
        try:
            text = a.prompt if a.prompt is not None else input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        ids, said, shown = tokenizer.encode([prompt_text(text, "") if alpaca else text])[0], [], ""
        for step in decode(model, [[tokenizer.bos_id] + ids], a.max_new_tokens):
            said += [token for _, token in step]
            now = tokenizer.decode(said).lstrip()
            if not now.endswith("\ufffd"):              # half a character: wait for the rest of it
                print(now[len(shown):], end="", flush=True)
                shown = now
        print()
        if a.prompt is not None:
            return


def answer(model: Transformer, tokenizer: Tokenizer, queries: list, max_new_tokens: int = 64) -> list:
    """Greedy answers, as text, to (instruction, input) pairs in the Alpaca template."""
    return [text.strip() for text in complete(model, tokenizer, [prompt_text(*q) for q in queries],
                                              new=max_new_tokens)]


def read_questions(path: str) -> list:
    """[(language, instruction, input, right answer)] of a file of records, "en" where lang is missing."""
    return [(str(row.get("lang", "en")), *(need(place, row, key) for key in KEYS))
            for place, row in read_rows(path)]


def exact_match(model: Transformer, tokenizer: Tokenizer, questions: list) -> dict:
    """{language: (right answers, questions)}; right is what equals the answer but for spaces around it."""
    score = {}
    answers = answer(model, tokenizer, [(instruction, input) for _, instruction, input, _ in questions])
    for (lang, _, _, output), text in zip(questions, answers):
        right, n = score.get(lang, (0, 0))
        score[lang] = right + (text == output.strip()), n + 1
    return score


def compare(folders: dict, path: str, device: str, dtype) -> str:
    """A Markdown table of exact match by language (rows) for model folders {title: folder} (columns)."""
    questions, scores = read_questions(path), {}
    for title, folder in folders.items():
        model = load(folder, dtype, device)
        scores[title] = exact_match(model, Tokenizer(model.config), questions)
    rows = []
    for lang in sorted(scores[title], key=lambda lang: (lang == "en", lang)):
        name, n = "en (retention)" if lang == "en" and len(folders) > 1 else lang, scores[title][lang][1]
        rows.append([name, n, *(f"{score[lang][0] / n:.1%}" for score in scores.values())])
    return table(["language", "questions", *folders], rows)


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device found; use --device cpu, or a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def parse(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", nargs="+", metavar="DIR", help="a Hugging Face folder, such as OUT/model; lens "
                   "and align take two, before and after")
    p.add_argument("--prompt", help="answer this one instruction")
    p.add_argument("--max_new_tokens", type=int, default=256, help="longest answer to a prompt (default 256)")
    p.add_argument("--data", metavar="FILE", help="of --task, the official file; without --task, JSONL of "
                   "instruction, input, output, lang: exact match by language")
    p.add_argument("--data_en", metavar="FILE", help="of flores and the looks inside: the English side")
    p.add_argument("--task", choices=[*TASKS, *LOOKS], help="a benchmark, or a look inside")
    p.add_argument("--suite", metavar="FILE", help="run what this TOML file lists, see above")
    p.add_argument("--lang", help="the task's language: en, zh, vi or ar (default en; of lens: all)")
    p.add_argument("--limit", type=int, metavar="N", help="the first items alone (of lens: 32)")
    p.add_argument("--bos", default="auto", choices=["auto", "always", "never"],
                   help="before the context; auto: as transformers' tokenizer of the folder does")
    p.add_argument("--template", choices=["none", "alpaca"], help="round prompts and generative tasks; "
                   "default: alpaca for folders that train.py made, else none")
    p.add_argument("--out", metavar="FILE", help="JSON of the scores and of every setting that changes them")
    p.add_argument("--items", metavar="FILE", help="JSONL of every item: prompt, what came out, scores")
    p.add_argument("--plot", metavar="PNG", help="of lens and align: the picture")
    p.add_argument("--layer", type=int, help="of align: the one to draw (default: 15/32 of the depth)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    a = p.parse_args(argv)
    for key in ("limit", "max_new_tokens"):
        if getattr(a, key) is not None and getattr(a, key) < 1:
            raise InputError(f"--{key} is {getattr(a, key)}, expected at least 1")
    if bool(a.model) == bool(a.suite):
        raise InputError("nothing to do: give --model DIR, or --suite FILE")
    if a.task and not a.data:
        raise InputError(f"--task {a.task} needs --data FILE")
    if a.model and len(a.model) > (2 if a.task in ("lens", "align") else 1):
        raise InputError(f"--model has {len(a.model)} folders; lens and align take two, all else one")
    if a.plot and a.task not in ("lens", "align"):
        raise InputError("--plot draws --task lens and --task align")
    if WORLD > 1 and a.task not in TASKS and not a.suite:
        raise InputError("torchrun splits benchmarks and suites alone; run this without")
    return a


def main(argv=None):
    a = parse(argv)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    data = [a.data, a.data_en] if a.data_en else [a.data]
    if a.suite:
        suite(a)
    elif a.task in LOOKS:
        a.data = a.data if a.task == "lens" else data
        LOOKS[a.task](a)
    elif a.task:
        items = read_task(data, a.task, a.lang or "en")
        s = setting(a, a.model[0], a.task, a.lang or "en", data)
        result = benchmark(load(a.model[0], DTYPES[a.dtype], pick_device(a.device)), items, s, a.items)
        scores = [f"{100 * v['mean']:.2f}" + (f" ± {100 * v['stderr']:.2f}" if "stderr" in v else "")
                  for v in result["scores"].values()]
        n = max(v["n"] for v in result["scores"].values())
        say(table(["task", "language", "items", *result["scores"]], [[a.task, s["lang"], f"{n:,}", *scores]]))
        if a.out and not RANK:
            write_json(result, a.out)
            say(f"The scores and their settings are in {a.out}")
    elif a.prompt is not None or not a.data:
        talk(a)
    else:
        print(compare({"exact match": a.model[0]}, a.data, pick_device(a.device), DTYPES[a.dtype]))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        if not RANK:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped by hand")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
