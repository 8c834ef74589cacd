"""eval.py: what a model can do.

    python eval.py --model runs/NAME/model --prompt "法国使用什么货币？"            one answer
    python eval.py --model runs/NAME/model --data demo/test.jsonl               exact match by language
    python eval.py --model DIR --task xcopa --lang zh --data test.zh.jsonl      a benchmark of the paper

The benchmarks are read from their official files, or from JSONL with the hub's field names:

    xnli xcopa xstorycloze truthfulqa mmlu     by likelihood: which choice does the model find likeliest
    xquad mlqa mkqa                            by generation: greedy, up to the end of the line

Prompts, truncation and scores are those of lm-evaluation-harness 0.4.13, its mistakes included, so that
numbers compare (tests/agree.py shows item by item that they do); MKQA, which it lacks, is scored as its
authors do.
"""
import argparse
import collections
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import re
import string
import sys
import unicodedata

import torch
from tqdm import tqdm

from data import KEYS, Tokenizer, need, prompt_text, read_rows, read_text
from model import InputError, Tokens, Transformer, generate, load, read_json, write_json

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPEC = "lm-evaluation-harness 0.4.13"
NEW_TOKENS = 256                # of a generated answer, at most


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


# task: (its item, its score, published number of items, languages)
TASKS = {
    "xnli": (xnli, accuracy, dict.fromkeys(("en", "zh", "vi", "ar"), 2490)),
    "xcopa": (xcopa, accuracy, dict.fromkeys(("zh", "vi"), 500)),
    "xstorycloze": (xstorycloze, accuracy, dict.fromkeys(("en", "zh", "ar"), 1511)),
    "truthfulqa": (truthfulqa, truth, dict.fromkeys(("en", "zh", "vi", "ar"), 817)),
    "mmlu": (mmlu, accuracy, {"en": 14042, "zh": None, "vi": None, "ar": None}),
    "xquad": (xquad, squad_match, dict.fromkeys(("en", "zh", "vi", "ar"), 1190)),
    "mlqa": (mlqa, mlqa_match, {"en": 11590, "zh": 5137, "vi": 5495, "ar": 5335}),
    "mkqa": (mkqa, mkqa_match, dict.fromkeys(("en", "zh", "vi", "ar"), 10000)),
}


# ------------------------------------------------------------------------------------------- their files

def read_task(path: str, task: str, lang: str) -> list:
    """The Items of an official file, of JSONL with the hub's field names, or of a folder of such files."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if not name.startswith(".")]
    items = []
    for file in files:
        for place, row in read_table(file) if re.search(r"\.[ct]sv(\.gz)?$", file) else read_json_rows(file):
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
    """[[log P(choice | context), in nats, for each choice]], one pass an item: the choices are branches of
    one row, as in training. Softmax in fp32. What is longer than the model's positions is cut on the left."""
    asked, L, room, rows = pairs, model.config.num_layers, model.config.max_positions + 1, []
    # Equal choices of an item are computed once, so that they tie exactly.
    pairs = [(context, list(map(list, dict.fromkeys(map(tuple, choices))))) for context, choices in asked]
    for n, (context, choices) in enumerate(pairs):
        together = len(context) + max(map(len, choices)) <= room
        for group in [range(len(choices))] if together else [[c] for c in range(len(choices))]:
            longest = max(len(choices[c]) for c in group)
            rows.append((n, context[-max(1, room - longest):], group))
    tell_cut(len({n for n, context, _ in rows if len(context) < len(pairs[n][0])}), len(pairs))
    out = [[0.0] * len(choices) for _, choices in pairs]

    def size(row):
        return len(row[1]) + sum(len(pairs[row[0]][1][c]) for c in row[2])
    rows.sort(key=size, reverse=True)
    batches = [[]]
    for row in rows:
        if batches[-1] and sum(map(size, batches[-1])) + size(row) > budget:
            batches.append([])
        batches[-1].append(row)
    for batch in tqdm(batches, desc="scoring", unit="batch", leave=False):
        tokens = Tokens([[(context, L), *((pairs[n][1][c][:-1], L) for c in group)]
                         for n, context, group in batch])
        places, targets, owners = [], [], []
        for (n, context, group), starts in zip(batch, tokens.starts):
            for c, start in zip(group, starts[1:]):
                ids = pairs[n][1][c]
                places += [starts[0] + len(context) - 1, *range(start, start + len(ids) - 1)]
                targets += ids
                owners += [(n, c)] * len(ids)
        x = model(tokens, (L,))[L]
        places, targets = (torch.tensor(t, device=x.device) for t in (places, targets))
        for a in range(0, len(owners), 256):
            logp = model.logits(x[places[a:a + 256]]).log_softmax(-1)                       # (<= 256, V)
            for (n, c), value in zip(owners[a:], logp.gather(1, targets[a:a + 256, None])[:, 0].tolist()):
                out[n][c] += value
    return [[found[pairs[n][1].index(ids)] for ids in asked[n][1]] for n, found in enumerate(out)]


def completions(model: Transformer, tokenizer: Tokenizer, prompts: list) -> list:
    """Greedy continuations of prompts (lists of ids), as text up to the end of the line."""
    new = min(NEW_TOKENS, model.config.max_positions // 2)
    room = model.config.max_positions - new
    tell_cut(sum(len(prompt) > room for prompt in prompts), len(prompts))
    line_ends = {n for n in range(tokenizer.size) if "\n" in tokenizer.decode([n])}
    order, out = sorted(range(len(prompts)), key=lambda n: len(prompts[n])), [""] * len(prompts)
    for a in tqdm(range(0, len(order), 16), desc="answering", unit="batch", leave=False):
        batch = order[a:a + 16]
        answers = generate(model, [prompts[n][-room:] for n in batch], new, last=line_ends)
        for n, ids in zip(batch, answers):
            out[n] = tokenizer.decode(ids).split("\n")[0]
    return out


def tell_cut(cut: int, n: int) -> None:
    """Say how many prompts did not fit."""
    if cut:
        tqdm.write(f"note      {cut:,} of {n:,} prompts do not fit the model's positions: their beginnings "
                   "are cut")


def run_task(model: Transformer, items: list, task: str, lang: str, bos: bool, template: bool) -> list:
    """[{prompt, what the model made of it, gold, the scores}] of each item."""
    tokenizer, score = Tokenizer(model.config), TASKS[task][1]
    lines = []
    if items[0].choices:
        for item, found in zip(items, log_likelihoods(model, pairs(tokenizer, items, bos))):
            lines.append(dict(prompt=item.context, choices=item.choices, loglikelihoods=found, gold=item.gold,
                              **score(item, found, lang)))
        return lines
    texts = [prompt_text(item.context, "") if template else item.context for item in items]
    prompts = [[tokenizer.bos_id] * bos + ids for ids in tokenizer.encode(texts)]
    for item, prompt, text in zip(items, texts, completions(model, tokenizer, prompts)):
        lines.append(dict(prompt=prompt, text=text, gold=item.gold, **score(item, text, lang)))
    return lines


def summary(lines: list) -> dict:
    """{score: {mean, stderr, n}} over items."""
    out = {}
    for key in lines[0]:
        values = [line[key] for line in lines if isinstance(line[key], float)]
        if values:
            mean, n = sum(values) / len(values), len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1))
            out[key] = dict(mean=mean, stderr=spread / math.sqrt(n), n=n)
    return out


def benchmark(a) -> None:
    """One task in one language: a table, and the files of --out and --items."""
    languages = TASKS[a.task][2]
    if a.lang not in languages:
        raise InputError(f"--lang {a.lang}: {a.task} has {', '.join(languages)}")
    items, published = read_task(a.data, a.task, a.lang), languages[a.lang]
    if published and len(items) != published:
        print(f"note      {a.data} has {len(items):,} items; {a.task} was published with {published:,}")
    model = load(a.model, DTYPES[a.dtype], pick_device(a.device))
    bos = adds_bos(a.model) if a.bos == "auto" else a.bos == "always"
    if model.config.gemma and not bos:
        raise InputError("--bos never: Gemma learnt with BOS before every text and breaks down without")
    tuned = os.path.exists(os.path.join(os.path.dirname(os.path.normpath(a.model)), "settings.json"))
    template = not items[0].choices and (a.template == "alpaca" or a.template is None and tuned)
    lines = run_task(model, items[:a.limit], a.task, a.lang, bos, template)
    scores = summary(lines)
    result = dict(task=a.task, lang=a.lang, scores=scores, items_in_file=len(items), limit=a.limit,
                  published_items=published, data=a.data, model=a.model, model_sha256=folder_digest(a.model),
                  bos=bos, dtype=a.dtype, shots=0, template="alpaca" if template else "none", spec=SPEC)
    print(f"| task | language | items | {' | '.join(scores)} |\n|{' --- |' * (3 + len(scores))}")
    print(f"| {a.task} | {a.lang} | {len(lines):,} | "
          + " | ".join(f"{100 * s['mean']:.2f} ± {100 * s['stderr']:.2f}" for s in scores.values()) + " |")
    if a.out:
        write_json(result, a.out)
    if a.items:
        with open(a.items, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def folder_digest(folder: str) -> str:
    """SHA-256 of what makes a model: config.json and the weights."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name == "config.json" or name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- answers

def answer(model: Transformer, tokenizer: Tokenizer, queries: list, max_new_tokens: int = 64) -> list:
    """Greedy answers, as text, to (instruction, input) pairs in the Alpaca template."""
    prompts = [[tokenizer.bos_id] + ids for ids in tokenizer.encode([prompt_text(*q) for q in queries])]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    batches = [order[a:a + 64] for a in range(0, len(order), 64)]
    out = [""] * len(prompts)
    for batch in tqdm(batches, desc="answering", unit="batch", leave=False, disable=len(batches) < 2):
        for n, ids in zip(batch, generate(model, [prompts[n] for n in batch], max_new_tokens)):
            out[n] = tokenizer.decode(ids).strip()
    return out


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
    lines = ["| language | questions | " + " | ".join(folders) + " |", "| --- " * (2 + len(folders)) + "|"]
    for lang in sorted(scores[title], key=lambda lang: (lang == "en", lang)):
        name, n = "en (retention)" if lang == "en" and len(folders) > 1 else lang, scores[title][lang][1]
        shares = " | ".join(f"{score[lang][0] / n:.1%}" for score in scores.values())
        lines.append(f"| {name} | {n} | {shares} |")
    return "\n".join(lines)


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device found; use --device cpu, or a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder, such as OUT/model")
    p.add_argument("--prompt", help="answer this one instruction")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer to --prompt (default 64)")
    p.add_argument("--data", metavar="FILE", help="of --task, the official file; without --task, JSONL of "
                   "instruction, input, output, lang: exact match by language")
    p.add_argument("--task", choices=TASKS, help="a benchmark")
    p.add_argument("--lang", default="en", help="its language: en, zh, vi or ar")
    p.add_argument("--limit", type=int, metavar="N", help="its first items alone")
    p.add_argument("--bos", default="auto", choices=["auto", "always", "never"],
                   help="before the context; auto: as transformers' tokenizer of the folder does")
    p.add_argument("--template", choices=["none", "alpaca"], help="round prompts of generative tasks; "
                   "default: alpaca for folders that train.py made, else none")
    p.add_argument("--out", metavar="FILE", help="JSON of the scores and of every setting that changes them")
    p.add_argument("--items", metavar="FILE", help="JSONL of every item: prompt, what came out, scores")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    a = p.parse_args()
    if a.prompt is None and a.data is None:
        raise InputError("nothing to do: give --data FILE or --prompt TEXT")
    if a.limit is not None and a.limit < 1:
        raise InputError(f"--limit is {a.limit}, expected at least 1")
    device, dtype = pick_device(a.device), DTYPES[a.dtype]
    if a.task:
        benchmark(a)
    elif a.prompt is not None:
        model = load(a.model, dtype, device)
        print(answer(model, Tokenizer(model.config), [(a.prompt, "")], a.max_new_tokens)[0])
    else:
        print(compare({"exact match": a.model}, a.data, device, dtype))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
