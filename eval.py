"""eval.py: ask a model, score it on benchmarks, and look at its layers.

    python eval.py --model runs/NAME/model                                  chat
    python eval.py --model DIR --prompt "马里的人用什么钱付款？"               one answer
    python eval.py --model DIR --data demo/test.jsonl                       exact match by language
    python eval.py --model DIR --task xcopa --lang zh --data test.zh.jsonl  a benchmark
    python eval.py --model A B --task xcopa.zh=FILE xnli.zh=FILE            several, in one table
    python eval.py --model BEFORE AFTER --task lens --data zh.jsonl --out lens.json

Multiple choice by log-likelihood: xnli xcopa xstorycloze truthfulqa mmlu. One generated line:
xquad mlqa mkqa flores. Files are the official releases, or JSONL with the field names of the
Hugging Face datasets. Prompts and scores are those of lm-evaluation-harness 0.4.13, its mistakes
included, so that numbers are comparable (tests/agree.py), except: MKQA has our prompt and its
authors' scores, FLORES (--lang en-zh --data ZH --data_en EN) has sacrebleu's, and models exported
by train.py answer in the Alpaca prompt (--template none turns that off). For other benchmarks, use
lm_eval --model hf.
"""
import argparse
import csv
import glob
import io
import json
import math
import os
import re
import statistics
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import (Tokenizer, chat_template, make_records, optional_json, prompt_text,
                  read_parallel, read_rows, read_text, text_of)
from dft import choose_layers, lens
from model import (DTYPES, Config, InputError, Packed, decode, generate, load, pick_device,
                   write_json)


class Subject:
    """A model under evaluation. bos and template "auto": as its folder says; a question is put into
    the Alpaca template if the folder's chat template is exactly the one that train.py exports."""

    def __init__(self, folder, dtype, device, bos="auto", template="auto"):
        config, found = Config.read(folder), optional_json(folder, "tokenizer_config.json")
        if bos == "never" and config.gemma:
            raise InputError("--bos never: a Gemma model needs BOS; use --bos auto")
        self.folder, self.tokenizer = folder, Tokenizer(config)
        bos_id = [self.tokenizer.bos_id]
        self.bos = {"auto": self.tokenizer.bos, "always": bos_id, "never": []}[bos]
        found = found.get("chat_template")              # where transformers 4 keeps it
        if os.path.exists(f"{folder}/chat_template.jinja"):
            found = read_text(f"{folder}/chat_template.jinja")
        exported = found in (chat_template(True), chat_template(False))
        self.alpaca = template == "alpaca" or template == "auto" and exported
        self.model = load(folder, dtype, device)

    def prompt(self, question: str) -> str:
        return prompt_text(question, "") if self.alpaca else question

    def encode(self, texts: list) -> list:
        """Ids of each text, with BOS if this model takes it; at least one."""
        return [self.bos + ids or [self.tokenizer.bos_id] for ids in self.tokenizer.encode(texts)]

    def complete(self, prompts: list, max_new_tokens: int, one_line=False) -> list:
        """Greedy continuations. A prompt that leaves no room for one loses its beginning."""
        positions, last = self.model.config.max_position_embeddings, ()
        new = min(max_new_tokens, positions // 2)
        ids = cut(self.encode(prompts), [positions - new] * len(prompts))
        if one_line:                                    # ends after a token that holds a line end
            last = [n for n in range(self.tokenizer.size) if "\n" in self.tokenizer.decode([n])]
        texts = [""] * len(ids)
        for batch in batches("answering", [len(prompt) + new for prompt in ids], 2 ** 15):
            replies = generate(self.model, [ids[n] for n in batch], new, last=last)
            for n, reply in zip(batch, replies):
                texts[n] = self.tokenizer.decode(reply)
        return [text.split("\n")[0] for text in texts] if one_line else texts

    def stream(self, question: str, max_new_tokens: int) -> None:
        """Print an answer while it is generated."""
        ids, shown = [], 0
        for step in decode(self.model, self.encode([self.prompt(question)]), max_new_tokens):
            ids += [token for _, token in step]
            text = self.tokenizer.decode(ids).lstrip()
            if not text.endswith("\ufffd"):             # half a character: wait for the rest
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print(self.tokenizer.decode(ids).lstrip()[shown:])

    def chat(self, max_new_tokens: int) -> None:
        """Answer every line typed, until ^D. A prompt that fails does not end the chat."""
        import readline  # noqa: F401  (input() then understands the arrow keys)
        form = "in the Alpaca template" if self.alpaca else "without a template"
        print(f"{self.folder} gets prompts {form}. One a line; ^D ends.", file=sys.stderr)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                if line.strip():
                    self.stream(line, max_new_tokens)
            except (EOFError, KeyboardInterrupt):
                return
            except (InputError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)


def cut(prompts: list, rooms: list) -> list:
    """The last ids of each prompt, as many as its room; says how many were longer."""
    longer = sum(len(ids) > room for ids, room in zip(prompts, rooms))
    if longer:
        print(f"note: {longer} of {len(prompts)} prompts do not fit the model's positions; their "
              "beginnings are cut", file=sys.stderr)
    return [ids[-room:] for ids, room in zip(prompts, rooms)]


def batches(title: str, sizes: list, budget: int):
    """Item numbers, largest first, in groups of at most `budget` tokens; with a progress bar."""
    groups, total = [], budget
    for n in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        total += sizes[n]
        if total > budget:
            groups.append([])
            total = sizes[n]
        groups[-1].append(n)
    return tqdm(groups, title, leave=False, disable=len(groups) < 2)


@torch.no_grad()
def log_likelihoods(subject: Subject, items: list, budget: int = 2048) -> list:
    """[log P(choice | context) of each choice], in nats, for each item. Context and choice are
    encoded as one text; the choice is what follows after as many tokens as the context has by
    itself. A context that is too long loses its beginning."""
    model, contexts, rooms, choices, scores = subject.model, [], [], [], {}
    L, positions = model.config.num_hidden_layers, model.config.max_position_embeddings
    for item in items:
        context = item.context.rstrip()                     # spaces at its end begin the choice
        ids, *both = subject.tokenizer.encode([context, *(item.context + c for c in item.choices)])
        choices.append([joint[len(ids):] for joint in both])
        contexts += subject.encode([context])
        longest = max(map(len, choices[-1])) - 1            # its last id is predicted, not read
        rooms.append(max(1, positions - longest))
    contexts = cut(contexts, rooms)
    sizes = [len(ids) + sum(map(len, own)) for ids, own in zip(contexts, choices)]
    for batch in batches("scoring", sizes, budget):
        packed, indices, targets, lengths = Packed(), [], [], []
        for n in batch:
            prompt = packed.add(contexts[n], L)             # each choice is a branch of this row
            for choice in choices[n]:
                continued = packed.add(choice[:-1], L, after=prompt)
                indices += [prompt[-1], *continued][:len(choice)]       # each predicts the next id
                targets += choice
                lengths.append(len(choice))
        x = model(packed, (L,))[L]
        logp = model.logits(x[indices]).log_softmax(-1)                     # (len(targets), V)
        chosen = logp[range(len(targets)), targets].cpu().split(lengths)    # by choice
        sums = iter([own.sum().item() for own in chosen])
        for n in batch:
            scores[n] = [next(sums) for _ in choices[n]]
    return [scores[n] for n in range(len(items))]


# -------------------------------------------------------------------------------------- exact match

@dataclass
class Item:
    """A question."""
    context: str
    choices: list               # continuations, with the space that begins them; [] to let it write
    gold: object                # number of the right choice; without choices, all accepted answers


def read_questions(path: str) -> dict:
    """{language: [Item]} of a file of records; the language is "en" if a record has no lang."""
    questions = {}
    for where, row in read_rows(path):
        texts = [text_of(where, row, key, key == "input")
                 for key in ("instruction", "input", "output")]
        item = Item(prompt_text(*texts[:2]), [], texts[2].strip())
        questions.setdefault(str(row.get("lang", "en")), []).append(item)
    return questions


def compare(folders: dict, path: str, device: str, dtype, bos="auto") -> str:
    """A Markdown table by language for model folders {title: folder}: the share of answers that
    equal the right one, but for spaces around it; and the share in the language of the question. An
    answer whose words are all in the right one counts as that, too ("Euro" in Vietnamese)."""
    questions = read_questions(path)
    head, rows = ["language", "questions"], {}
    for lang in sorted(questions, key=lambda lang: (lang == "en", lang)):
        name = "en (retention)" if lang == "en" and len(folders) > 1 else lang
        rows[lang] = [name, len(questions[lang])]
    for title, folder in folders.items():
        subject = Subject(folder, dtype, device, bos)
        head += [title, f"{title}, in the language"]
        for lang, items in questions.items():
            right = own = 0
            for item, text in zip(items, subject.complete([item.context for item in items], 64)):
                words = set(text.lower().split())
                right += text.strip() == item.gold
                own += bool(words) and (written_in(lang, text) or
                                        words <= set(item.gold.lower().split()))
            shares = [f"{right / len(items):.1%}", f"{own / len(items):.1%}"]
            rows[lang] += shares if lang in NAMES else [shares[0], "not judged"]
    return markdown(head, list(rows.values()))


def written_in(lang: str, text: str) -> bool:
    """Roughly, whether a text is in a language: zh, ar: a fifth of its letters are of that script;
    vi: one in fifty is Latin and not ASCII; en: 19 in 20 are ASCII."""
    letters = [c for c in text if c.isalpha()]
    if lang not in SCRIPTS:
        return sum(c.isascii() for c in letters) >= 0.95 * len(letters)
    script, share = SCRIPTS[lang]
    found = [c for c in letters if not c.isascii() and unicodedata.name(c, "").startswith(script)]
    return len(found) >= max(1, share * len(letters))


def markdown(head: list, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --------------------------------------------------------------------------------------- the layers

def lens_numbers(subject: Subject, args) -> dict:
    """L + 1 numbers each, means over parallel records: the entropy, in nats, at the query's tokens
    in the target language, and in English; and the probabilities, after the target-language prompt,
    of the first token of the target-language and of the English answer, where these differ."""
    rows = [(where, row) for where, row in read_parallel(args.data, args.data_en)
            if "output_en" in row and args.lang in (None, row.get("lang"))][:args.limit or 32]
    if not rows:
        raise InputError(f"{args.data}: no record with an English side (and lang {args.lang})")
    model, own, english, first = subject.model, [], [], []
    L, room = model.config.num_hidden_layers, min(512, model.config.max_position_embeddings)
    for r in make_records(rows, subject.tokenizer, "both", room)[0]:
        if r.answer_en is None:                                 # half of an English side
            continue
        packed, ids = Packed(), [r.answer[0], r.answer_en[0]]
        row, row_en = packed.add(r.prompt, L), packed.add(r.prompt_en, L)
        query, query_en = row[slice(*r.query)], row_en[slice(*r.prompt_en_query)]
        indices = [*query, *query_en, row[-1]]
        entropy, p = lens(model, packed, indices, torch.tensor([ids] * len(indices)))
        own.append(entropy[:, :len(query)])                     # (L + 1, tokens)
        english.append(entropy[:, len(query):-1])
        if ids[0] != ids[1]:
            first.append(p[:, -1])                              # (L + 1, 2)
    if not own:
        raise InputError(f"{args.data}: no record with a whole English side")
    numbers = {"entropy": torch.cat(own, 1).mean(1).tolist(),
               "entropy_en": torch.cat(english, 1).mean(1).tolist()}
    if first:
        numbers["p_target"], numbers["p_english"] = torch.stack(first).mean(0).T.tolist()
    i, j, why = choose_layers(numbers["entropy"])
    return dict(n=len(own), pivots=len(first), **numbers, i=i, j=j, why=why, map=own[0].tolist())


# --------------------------------------------------------------------------------------- benchmarks

SCRIPTS = {"zh": ("CJK", 0.2), "ar": ("ARABIC", 0.2), "vi": ("LATIN", 0.02)}
NAMES = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "ar": "Arabic"}
TASKS = {           # {language: number of items in the split that papers report}
    "xnli": dict.fromkeys(NAMES, 2490),                                     # validation
    "xcopa": dict(zh=500, vi=500),                                          # test
    "xstorycloze": dict(en=1511, zh=1511, ar=1511),                         # eval
    "truthfulqa": dict(en=817, zh=788, vi=785, ar=773),                     # validation
    "mmlu": dict(en=14042, zh=None, vi=None, ar=None),                      # test
    "xquad": dict.fromkeys(NAMES, 1190),                                    # validation
    "mlqa": dict(en=11590, zh=5137, vi=5495, ar=5335),                      # test
    "mkqa": dict.fromkeys(NAMES, 10000),
    "flores": dict.fromkeys(("en-zh", "en-vi", "en-ar", "zh-en", "vi-en", "ar-en"), 1012),
}
XNLI = {"en": ("right", "Yes", "Also", "No"), "zh": ("正确", "是的", "所以", "不是的"),
        "vi": ("đúng", "Vâng", "Vì vậy", "Không"), "ar": ("صحيح", "نعم", "لذا", "رقم")}
XCOPA = {"zh": {"cause": "因为", "effect": "所以"}, "vi": {"cause": "bởi vì", "effect": "vì vậy"}}
XQUAD = {"en": ("Context", "Question", "Answer"), "zh": ("语境", "问题", "回答"),
         "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"), "ar": ("سيا", "سؤال", "إجابة")}
PRIMER = "\n\n".join((
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.",
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.",
    "Q: Which party did he belong to?\nA: He belonged to the Republican Party.",
    "Q: What is the square root of banana?\nA: I have no comment.",
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.",
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."))


def make_item(task: str, lang: str, row: dict) -> Item:
    """A row of a file -> its prompt, choices and right answer."""
    if task == "xnli":
        question, *words = XNLI[lang]
        label = {"entailment": 0, "neutral": 1, "contradiction": 2}.get(row["label"], row["label"])
        choices = [f" {row['premise']}, {question}? {word}, {row['hypothesis']}" for word in words]
        return Item("", choices, int(label))
    if task == "xcopa":
        choices = [f" {c[:1].lower()}{c[1:]}" for c in (row["choice1"], row["choice2"])]
        context = f"{row['premise'].strip()[:-1]} {XCOPA[lang][row['question']]}"
        return Item(context, choices, int(row["label"]))
    if task == "xstorycloze":
        context = " ".join(row[f"input_sentence_{n}"] for n in (1, 2, 3, 4))
        choices = [f" {row['sentence_quiz1']}", f" {row['sentence_quiz2']}"]
        return Item(context, choices, int(row["answer_right_ending"]) - 1)
    if task == "truthfulqa":    # gold: how many choices are mc1's (first: right), mc2's labels
        mc1 = row.get("mc1_targets_choices") or row["mc1_targets"]["choices"]
        mc2 = row.get("mc2_targets_choices") or row["mc2_targets"]["choices"]
        labels = row.get("mc2_targets_labels") or row["mc2_targets"]["labels"]
        question = row["question"]
        if lang != "en":
            question = (question or " ").strip().replace(" [title]", ". ")
            question = re.sub(r"\[.*?\]", "", question).replace("  ", " ")
        return Item(f"{PRIMER}\n\nQ: {question}\nA:", [f" {choice}" for choice in mc1 + mc2],
                    [len(mc1), labels])
    if task == "mmlu":
        choices = row.get("choices") or [row[f"option_{letter}"] for letter in "abcd"]
        options = "".join(f"\n{letter}. {c}" for letter, c in zip("ABCD", choices, strict=True))
        question = row["question"] if "question" in row else row["instruction"]
        prompt = f"{question.strip()}{options}\nAnswer:"
        if lang == "en":
            prompt = ("The following are multiple choice questions (with answers) about "
                      f"{row['subject'].replace('_', ' ')}.\n\n{prompt}")
        gold = dict(A=0, B=1, C=2, D=3).get(row["answer"], row["answer"])
        return Item(prompt, [" A", " B", " C", " D"], int(gold))
    if task == "mkqa":          # no prompt is published for it: this one is ours
        lang, gold = "zh_cn" if lang == "zh" else lang, []
        for answer in row["answers"][lang]:
            gold += [answer["text"] or "", *(answer.get("aliases") or [])]
        return Item(f"Question: {row['queries'][lang]}\nAnswer:", [], gold)
    if task == "flores":
        source, target = lang.split("-")
        prompt = f"{NAMES[source]} sentence: {row[source]}\n{NAMES[target]} sentence:"
        return Item(prompt, [], [row[target]])
    context, question, answer = XQUAD["en" if task == "mlqa" else lang]
    prompt = f"{context}: {row['context']}\n\n{question}: {row['question']}\n\n{answer}:"
    return Item(prompt, [], row["answers"]["text"])


def score(task: str, lang: str, item: Item, answer) -> dict:
    """{metric: value} of an answer: the log-likelihoods of the choices, or a text."""
    if task == "truthfulqa":
        count, labels = item.gold
        mc1, mc2 = answer[:count], [math.exp(ll - max(answer[count:])) for ll in answer[count:]]
        true = sum(p for p, label in zip(mc2, labels) if label)
        return {"mc1": float(mc1.index(max(mc1)) == 0), "mc2": true / sum(mc2)}
    if task == "xquad":         # the harness takes the first answer, and English rules
        return {**matches("xquad", "en", answer, item.gold[:1]),
                "f1_mlqa": matches("mlqa", lang, answer, item.gold)["f1"]}
    if task in ("mlqa", "mkqa"):
        return matches(task, lang, answer, item.gold)
    if task == "flores":        # only has scores of all sentences together
        return {}
    return {"acc": float(answer.index(max(answer)) == item.gold)}           # of equals the first


def matches(rules: str, lang: str, text: str, accepted: list) -> dict:
    """Exact match and F1, each with the best of the accepted answers."""
    exact, f1, mine = [], [], words(rules, lang, text)
    for gold in (words(rules, lang, answer) for answer in accepted):
        same = sum((Counter(mine) & Counter(gold)).values())
        exact.append(float(mine == gold))
        f1.append(2 * same / max(1, len(mine) + len(gold)))
    return {"exact_match": max(exact), "f1": max(f1 + exact)}           # two empty texts: 1


def words(rules: str, lang: str, text: str) -> list:
    """Lower-case words without punctuation and articles; mlqa, mkqa: Chinese by the character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and not (
        rules == "mlqa" and unicodedata.category(c).startswith("P")))
    articles = {"en": r"\b(a|an|the)\b", "vi": r"\b(của|là|cái|chiếc|những)\b",
                "ar": r"(?:^|\s)ال" if rules == "mlqa" else r"\sال^|ال"}     # MKQA: anywhere
    if lang in articles:
        text = re.sub(articles[lang], " ", text)
    if lang == "zh":
        text = re.sub(r"(\S)" if rules == "mkqa" else "([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def run_test(subject: Subject, task: str, lang: str, items: list) -> list:
    """A dict of each item: prompt, choices, right answer, the model's answer and its scores."""
    prompts, lines = [item.context for item in items], []
    if items[0].choices:
        key, answers = "loglikelihoods", log_likelihoods(subject, items)
    else:
        prompts = [subject.prompt(prompt) for prompt in prompts]
        key, answers = "text", subject.complete(prompts, 256, one_line=True)
    for item, prompt, answer in zip(items, prompts, answers):
        lines.append({"model": subject.folder, "task": task, "lang": lang, "prompt": prompt,
                      "choices": item.choices, "gold": item.gold, key: answer,
                      **score(task, lang, item, answer)})
    return lines


def summary(task: str, lang: str, lines: list) -> dict:
    """{metric: {mean, stderr, n}} over the items that run_test() returned; scores of the whole."""
    out, n = {}, len(lines)
    for key in [key for key, value in lines[0].items() if isinstance(value, float)]:
        values = [line[key] for line in lines]
        spread = statistics.stdev(values) if n > 1 else 0.0
        out[key] = dict(mean=statistics.fmean(values), stderr=spread / math.sqrt(n), n=n)
    if task == "mkqa":         # as its authors' script, given no probabilities of "no answer"
        total = best = sum(not any(line["gold"]) for line in lines)     # if it answered nothing
        for line in lines:
            total += line["f1"] if any(line["gold"]) else -float(line["text"] != "")
            best = max(best, total)
        out["best_f1"] = dict(mean=best / n, n=n)
    if task == "flores":
        import sacrebleu
        texts, gold = [line["text"].strip() for line in lines], [line["gold"][0] for line in lines]
        split = "zh" if lang.endswith("zh") else "13a"             # 13a does not split Chinese
        bleu = sacrebleu.corpus_bleu(texts, [gold], tokenize=split).score / 100
        out["chrf"] = dict(mean=sacrebleu.corpus_chrf(texts, [gold]).score / 100, n=n)
        out["bleu"] = dict(mean=bleu, n=n, tokenizer=split)
    return out


def read_test(task: str, lang: str, path: str, path_en: str | None = None) -> tuple:
    """(what a result says of its test, the items) of a task's file, or of all files of a folder."""
    if lang not in TASKS[task]:
        raise InputError(f"--lang {lang}: {task} has {', '.join(TASKS[task])}")
    published, items, rows = TASKS[task][lang], [], []
    if task == "flores":
        import sacrebleu  # noqa: F401  (summary() needs it: without it, fail now)
        rows = read_flores(lang, path, path_en)
    else:
        for file in sorted(glob.glob(f"{glob.escape(path)}/*")) or [path]:
            rows += read_file(file)
    for where, row in rows:
        try:
            item = make_item(task, lang, row)
            if item.gold == [] or type(item.gold) is int and not 0 <= item.gold < len(item.choices):
                raise ValueError(f"its right answer is {item.gold}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{where}: not an item of {task} in {lang} ({type(error).__name__} "
                             f"{error}); its keys: {', '.join(map(str, row))[:200]}") from None
        items.append(item)
    if not items:
        raise InputError(f"{path}: no item of {task} in it")
    warnings, text = [], str([list(row.values()) for _, row in rows[:100]])
    if task not in ("mkqa", "flores") and not written_in(lang, text):
        warnings.append(f"{path}: the text does not look like {NAMES[lang]}")
    if len(items) != published:
        warnings.append(f"{path}: {len(items):,} items; published: {published or 'unknown'}")
    for warning in warnings:
        print("warning:", warning, flush=True)
    return dict(task=task, lang=lang, data=path, data_en=path_en, warnings=warnings, shots=0,
                items_in_file=len(items), published_items=published,
                spec="lm-evaluation-harness 0.4.13"), items


def read_file(path: str) -> list:
    """[(where, row)] of JSONL, a JSON array, SQuAD's JSON, MMLU's CSV or XNLI's TSV (of XTREME)."""
    text, rows, names, form = read_text(path), [], None, {}
    if ".csv" in path:
        names = ["question", "option_a", "option_b", "option_c", "option_d", "answer"]
    elif ".tsv" in path:
        names = ["premise", "hypothesis", "label"]
        form = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    if names:
        subject = re.sub(r"_(test|val|dev)\..*", "", os.path.basename(path))       # MMLU's
        table = csv.DictReader(io.StringIO(text, newline=""), names, **form)
        for row in table:
            if row.get("answer") != "answer":                                       # a header
                rows.append((f"{path}:{table.line_num}", {"subject": subject, **row}))
        return rows
    if not re.match(r'\s*{\s*"(data|version)"\s*:', text):
        return read_rows(path)
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = {"text": [answer["text"] for answer in qa["answers"]]}
                    row = {**qa, "context": paragraph["context"], "answers": answers}
                    rows.append((f"{path} {qa['id']}", row))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not SQuAD's JSON ({type(error).__name__} {error})") from None
    return rows


def read_flores(lang: str, path: str, path_en: str | None) -> list:
    """Rows {language: sentence} of two files: a sentence a line, or FLORES+ with its "text"."""
    if not path_en:
        raise InputError("flores: expected --data FILE and --data_en FILE, the English side")
    sides = {}
    for side in lang.split("-"):
        file = path_en if side == "en" else path
        text = read_text(file)
        if re.match(r"\s*\[?\s*{", text):               # FLORES+: JSON, not plain sentences
            sides[side] = [text_of(where, row, "text") for where, row in read_rows(file)]
        else:
            sides[side] = re.split("\r?\n", text.strip())
    a, b = sides.values()
    if len(a) != len(b):
        raise InputError(f"{path}: {len(a)} and {len(b)} sentences, expected equally many")
    return [(f"{path}:{n}", dict(zip(sides, pair))) for n, pair in enumerate(zip(a, b), 1)]


# ------------------------------------------------------------------------------------- command line

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="Hugging Face model folders")
    add("--prompt", metavar="TEXT", help="answer this one instruction")
    add("--max_new_tokens", type=int, default=256, metavar="N",
        help="longest answer in tokens (default: 256)")
    add("--data", metavar="FILE", help="file of --task; without --task, questions to answer")
    add("--data_en", metavar="FILE", help="the English side of --data, for flores and lens")
    add("--task", nargs="+", default=[], metavar="TASK",
        help="a benchmark, or lens, on --data; or several benchmarks, each written TASK.LANG=FILE")
    add("--lang", help="language of the task: en (default), zh, vi, ar; flores: en-zh, zh-en, ...")
    add("--limit", type=int, metavar="N", help="use the first N items (default: all; lens: 32)")
    add("--bos", default="auto", choices=["auto", "always", "never"],
        help="whether prompts begin with BOS; auto: as the folder's tokenizer does it")
    add("--template", default="auto", choices=["auto", "alpaca", "none"],
        help="the form of prompts (exact match: alpaca); auto: as the folder's chat template")
    add("--out", metavar="FILE", help="write the scores and the settings they depend on as JSON")
    add("--items", metavar="FILE", help="write every item with its answer and its scores as JSONL")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the model runs")
    add("--dtype", default="fp32", choices=DTYPES, help="dtype of weights and computation")
    args = parser.parse_args(argv)
    if not args.task and (args.limit or args.out or args.items):
        raise InputError("--limit, --out and --items: expected --task as well")
    if args.limit is not None and args.limit < 1 or args.max_new_tokens < 1:
        raise InputError("--limit and --max_new_tokens: expected at least 1")
    for path in filter(None, (args.out, args.items)):       # not after hours of computing
        if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
            raise InputError(f"{path}: expected a file name, in a folder that can be written")
    return args


def evaluate(args, settings: tuple) -> None:
    """Run all tests on all models; print a table, write --out and --items."""
    tests, results, lines, head, rows = [], [], [], ["model"], []
    for spec in args.task:
        name, _, file = spec.partition("=")
        task, _, lang = name.partition(".")
        path = file or args.data
        if task not in TASKS or not path or not file and len(args.task) > 1:
            raise InputError(f"--task {spec}: expected lens or {', '.join(TASKS)} with --data FILE "
                             "and --lang; or several benchmarks, each written TASK.LANG=FILE")
        tests.append(read_test(task, lang or args.lang or "en", path, args.data_en))
    for folder in args.model:
        subject, row = Subject(folder, *settings), [folder]
        for test, items in tests:
            task, lang = test["task"], test["lang"]
            answered = run_test(subject, task, lang, items[:args.limit])
            scores = summary(task, lang, answered)
            alpaca = subject.alpaca and not items[0].choices
            results.append({
                **test, "model": folder, "limit": args.limit, "dtype": args.dtype, "scores": scores,
                "bos": bool(subject.bos), "template": "alpaca" if alpaca else "none"})
            for line in answered:
                lines.append({"model": folder, "task": task, "lang": lang, **line})
            for name, found in scores.items():
                head += [] if rows else [f"{task}.{lang} {name}"]
                error = f" ± {100 * found['stderr']:.2f}" if "stderr" in found else ""
                row.append(f"{100 * found['mean']:.2f}{error}")
        rows.append(row)
        del subject                                         # two models may not fit
    print(markdown(head, rows))
    if args.items:
        with open(args.items, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.out:
        write_json(results if len(results) > 1 else results[0], args.out)
        print(f"\nThe scores and their settings are in {args.out}.")


def show_lens(args, settings: tuple) -> None:
    """Print the lens of each model, layer by layer, and write --out."""
    results = []
    for folder in args.model:
        found = lens_numbers(Subject(folder, *settings), args)
        results.append({"model": folder, "data": args.data, "lang": args.lang, **found})
        columns = {"layer": range(len(found["map"]))}
        for key in ("entropy", "entropy_en", "p_english", "p_target"):
            if key in found:
                columns[key] = [f"{value:.3f}" for value in found[key]]
        print(f"{folder}: {found['n']} records; answers begin differently in {found['pivots']}\n")
        print(markdown(list(columns), list(zip(*columns.values()))))
        print(f"\ni = {found['i']}, j = {found['j']}: {found['why']}\n")
    if args.out:
        write_json(results, args.out)
    print(f"Next: python demo/figures.py {args.out} lens.png" if args.out else
          "Next: --out lens.json writes the numbers, from which demo/figures.py draws")


def main(argv=None) -> None:
    args = parse(argv)
    settings = DTYPES[args.dtype], pick_device(args.device), args.bos, args.template
    if args.task == ["lens"] and args.data:
        show_lens(args, settings)
    elif args.task:
        evaluate(args, settings)
    elif args.data:
        folders = {folder: folder for folder in args.model}
        print(compare(folders, args.data, settings[1], settings[0], args.bos))
        print(f"\nNext, ask it something: python eval.py --model {args.model[-1]} --prompt TEXT")
    elif args.prompt is not None:
        Subject(args.model[0], *settings).stream(args.prompt, args.max_new_tokens)
    else:
        Subject(args.model[0], *settings).chat(args.max_new_tokens)


if __name__ == "__main__":
    try:
        sys.stdout.reconfigure(errors="backslashreplace")       # for terminals without UTF-8
        main()
        sys.stdout.flush()
    except BrokenPipeError:                             # eval.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
