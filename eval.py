"""eval.py: ask a model, score it on benchmarks, and look at its layers.

    python eval.py --model runs/NAME/model                                  chat
    python eval.py --model DIR --prompt "马里的人用什么钱付款？"               one answer
    python eval.py --model DIR --data demo/test.jsonl                       exact match by language
    python eval.py --model DIR --task xcopa --lang zh --data test.zh.jsonl  a benchmark
    python eval.py --model A B --task xcopa.zh=FILE xnli.zh=FILE            several, in one table
    python eval.py --model BEFORE AFTER --task lens --data zh.jsonl --out lens.json

Benchmarks: xnli, xcopa and truthfulqa by log-likelihood, xquad and mlqa by one generated line.
Files are JSONL or a JSON array with the field names of the Hugging Face datasets, or SQuAD's JSON.
Prompts and scores are those of lm-evaluation-harness 0.4.13, its mistakes included, so that numbers
are comparable (tests/agree.py), except that models exported by train.py answer in the Alpaca prompt
(--template none turns that off). For other benchmarks, use lm_eval --model hf.
"""
import argparse
import json
import math
import os
import re
import statistics
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from data import (LANGUAGES, Tokenizer, chat_template, make_records, optional_json, prompt_text,
                  read_parallel, read_rows, read_text, text_of)
from dft import choose_layers, lens
from model import (DTYPES, Config, InputError, Packed, generate, load, pick_device, write_json)


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

    def answer(self, question: str, max_new_tokens: int) -> str:
        return self.complete([self.prompt(question)], max_new_tokens)[0].strip()

    def chat(self, max_new_tokens: int) -> None:
        """Answer every line typed, until ^D."""
        import readline  # noqa: F401  (input() then understands the arrow keys)
        form = "in the Alpaca template" if self.alpaca else "without a template"
        print(f"{self.folder} gets prompts {form}. One a line; ^D ends.", file=sys.stderr)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                return
            except UnicodeDecodeError as error:
                print(f"error: not UTF-8 text ({error})", file=sys.stderr)
                continue
            if line.strip():
                print(self.answer(line, max_new_tokens), flush=True)


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


# -------------------------------------------------------------------------------------------- tests

# Benchmarks: {language: number of items in the split that papers report}
TASKS = {
    "xnli": dict(en=2490, zh=2490, vi=2490, ar=2490),                       # validation
    "xcopa": dict(zh=500, vi=500),                                          # test
    "truthfulqa": dict(en=817, zh=788, vi=785, ar=773),                     # validation
    "xquad": dict(en=1190, zh=1190, vi=1190, ar=1190),                      # validation
    "mlqa": dict(en=11590, zh=5137, vi=5495, ar=5335),                      # test
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


@dataclass
class Item:
    """A question."""
    context: str
    choices: list               # continuations, with the space that begins them; [] to let it write
    gold: object                # number of the right choice; without choices, all accepted answers


@dataclass
class Test:
    """The items of a benchmark, or the "questions" in one language of a file of records."""
    task: str
    lang: str
    data: str                   # the file
    items: list
    published_items: int | None = None
    warnings: list = field(default_factory=list)


def read_questions(path: str) -> list:
    """A Test for each language of a file of records; the language is "en" if a record has none."""
    tests = {}
    for where, row in read_rows(path):
        texts = [text_of(where, row, key, key == "input")
                 for key in ("instruction", "input", "output")]
        lang = str(row.get("lang") or "en")
        test = tests.setdefault(lang, Test("questions", lang, path, []))
        test.items.append(Item(prompt_text(*texts[:2]), [], [texts[2].strip()]))
    return [tests[lang] for lang in sorted(tests, key=lambda lang: (lang == "en", lang))]


def read_test(task: str, lang: str, path: str) -> Test:
    """The items of a benchmark in a file."""
    if lang not in TASKS[task]:
        raise InputError(f"--lang {lang}: {task} has {', '.join(TASKS[task])}")
    rows, items = read_benchmark(path), []
    for where, row in rows:
        try:
            item = make_item(task, lang, row, where)
            if isinstance(item.gold, int) and item.gold not in range(len(item.choices)):
                raise ValueError(f"its right answer is choice {item.gold}")
            items.append(item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not an item of {task} in {lang} ({type(error).__name__} "
                             f"{error}); its keys: {json.dumps(list(row))[:200]}") from None
    test = Test(task, lang, path, items, TASKS[task][lang])
    if not written_in(lang, str([list(row.values()) for _, row in rows[:100]])):
        test.warnings.append(f"{path}: the text does not look like {LANGUAGES[lang]}")
    if len(items) != test.published_items:
        test.warnings.append(f"{path}: {len(items):,} items; published: {test.published_items:,}")
    for warning in test.warnings:
        print("warning:", warning, flush=True)
    return test


def read_benchmark(path: str) -> list:
    """[(where, row)] of JSONL, a JSON array, or SQuAD's JSON."""
    rows, text = [], read_text(path)
    if not re.match(r'\s*{\s*"(data|version)"\s*:', text):
        return read_rows(path)
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = {"text": [answer["text"] for answer in qa["answers"]]}
                    row = {**qa, "context": paragraph["context"], "answers": answers}
                    rows.append((f"{path} {qa['id']}", row))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not SQuAD's JSON ({type(error).__name__} {error})") from None
    if not rows:
        raise InputError(f"{path}: no questions in it")
    return rows


def make_item(task: str, lang: str, row: dict, where: str = "row") -> Item:
    """A row of a file -> its prompt, choices and right answer."""
    def text(key):
        return text_of(where, row, key)

    if task == "xnli":
        question, *words = XNLI[lang]
        premise, hypothesis, label = text("premise"), text("hypothesis"), row["label"]
        choices = [f" {premise}, {question}? {word}, {hypothesis}" for word in words]
        names = {"entailment": 0, "neutral": 1, "contradiction": 2}
        return Item("", choices, int(names.get(label, label)))
    if task == "xcopa":
        choices = [f" {c[:1].lower()}{c[1:]}" for c in (text("choice1"), text("choice2"))]
        context = f"{text('premise').strip()[:-1]} {XCOPA[lang][row['question']]}"
        return Item(context, choices, int(row["label"]))
    if task == "truthfulqa":    # gold: how many choices are mc1's (first: right), mc2's labels
        mc1 = row.get("mc1_targets_choices") or row["mc1_targets"]["choices"]
        mc2 = row.get("mc2_targets_choices") or row["mc2_targets"]["choices"]
        labels = row.get("mc2_targets_labels") or row["mc2_targets"]["labels"]
        if len(mc2) != len(labels) or 1 not in labels:
            raise ValueError("mc2_targets: expected as many labels as choices, and one that is 1")
        question = text("question")
        if lang != "en":
            question = re.sub(r"\[.*?\]", "", question.strip().replace(" [title]", ". "))
            question = question.replace("  ", " ")
        choices = [f" {choice}" for choice in list_of_texts(mc1) + list_of_texts(mc2)]
        return Item(f"{PRIMER}\n\nQ: {question}\nA:", choices, [len(mc1), labels])
    context, question, answer = XQUAD["en" if task == "mlqa" else lang]
    prompt = f"{context}: {text('context')}\n\n{question}: {text('question')}\n\n{answer}:"
    return Item(prompt, [], list_of_texts(row["answers"]["text"]))


def list_of_texts(value) -> list:
    """The value; ValueError if it is not a list of one or more texts."""
    if not (isinstance(value, list) and value and all(isinstance(text, str) for text in value)):
        raise ValueError(f"found {json.dumps(value)[:40]}, expected a list of texts")
    return value


def score(test: Test, item: Item, answer) -> dict:
    """{metric: value} of an answer: the log-likelihoods of the choices, or a text."""
    task, lang = test.task, test.lang
    if task == "questions":
        found = {"exact_match": float(answer.strip() == item.gold[0])}
        if lang in SCRIPTS:         # "Euro" is Vietnamese, too, if it is the right answer
            words = set(answer.lower().split())
            own = written_in(lang, answer) or words <= set(item.gold[0].lower().split())
            found["in_language"] = float(bool(words) and own)
        return found
    if task == "truthfulqa":
        count, labels = item.gold
        mc1, mc2 = answer[:count], [math.exp(ll - max(answer[count:])) for ll in answer[count:]]
        true = sum(p for p, label in zip(mc2, labels) if label)
        return {"mc1": float(mc1.index(max(mc1)) == 0), "mc2": true / sum(mc2)}
    if task == "mlqa":
        return matches("mlqa", lang, answer, item.gold)
    if task == "xquad":         # the harness takes the first answer, and English rules
        return {**matches("xquad", "en", answer, item.gold[:1]),
                "f1_mlqa": matches("mlqa", lang, answer, item.gold)["f1"]}
    return {"acc": float(answer.index(max(answer)) == item.gold)}           # of equals the first


def matches(rules: str, lang: str, text: str, accepted: list) -> dict:
    """Exact match and F1, each with the best of the accepted answers."""
    exact, f1, mine = [], [], bag_of_words(rules, lang, text)
    for gold in (bag_of_words(rules, lang, answer) for answer in accepted):
        same = sum((Counter(mine) & Counter(gold)).values())
        exact.append(float(mine == gold))
        f1.append(2 * same / max(1, len(mine) + len(gold)))
    return {"exact_match": max(exact), "f1": max(f1 + exact)}           # two empty texts: 1


def bag_of_words(rules: str, lang: str, text: str) -> list:
    """Lower-case words without punctuation and articles; mlqa: Chinese by the character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and not (
        rules == "mlqa" and unicodedata.category(c).startswith("P")))
    articles = {"en": r"\b(a|an|the)\b", "vi": r"\b(của|là|cái|chiếc|những)\b", "ar": r"(?:^|\s)ال"}
    if lang in articles:
        text = re.sub(articles[lang], " ", text)
    if lang == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


# {language: (Unicode script, share of the letters of a text that are of it and not ASCII)}
SCRIPTS = {"zh": ("CJK", 0.2), "ar": ("ARABIC", 0.2), "vi": ("LATIN", 0.02), "en": ("LATIN", 0)}


def written_in(lang: str, text: str) -> bool:
    """Roughly, whether a text is in a language, by its letters; en: 19 in 20 are ASCII."""
    letters = [c for c in text if c.isalpha()]
    if lang == "en":
        return sum(c.isascii() for c in letters) >= 0.95 * len(letters)
    script, share = SCRIPTS[lang]
    found = [c for c in letters if not c.isascii() and unicodedata.name(c, "").startswith(script)]
    return len(found) >= max(1, share * len(letters))


def run_test(subject: Subject, test: Test, limit: int | None = None) -> list:
    """A dict of each item: prompt, choices, right answer, the model's answer and its scores."""
    items, lines = test.items[:limit], []
    prompts = [item.context for item in items]
    if items[0].choices:
        key, answers = "loglikelihoods", log_likelihoods(subject, items)
    elif test.task == "questions":                      # these are in the Alpaca template already
        key, answers = "text", subject.complete(prompts, 64)
    else:
        prompts = [subject.prompt(prompt) for prompt in prompts]
        key, answers = "text", subject.complete(prompts, 256, one_line=True)
    for item, prompt, answer in zip(items, prompts, answers):
        lines.append({"model": subject.folder, "task": test.task, "lang": test.lang,
                      "prompt": prompt, "choices": item.choices, "gold": item.gold, key: answer,
                      **score(test, item, answer)})
    return lines


def summary(lines: list) -> dict:
    """{metric: {mean, stderr, n}} over the items that run_test() returned."""
    out, n = {}, len(lines)
    for key in [key for key, value in lines[0].items() if isinstance(value, float)]:
        values = [line[key] for line in lines]
        spread = statistics.stdev(values) if n > 1 else 0.0
        out[key] = dict(mean=statistics.fmean(values), stderr=spread / math.sqrt(n), n=n)
    return out


def evaluate(folders: dict, tests: list, limit, *settings) -> tuple:
    """Run all tests on model folders {title: folder}: (results as for --out, lines as for --items,
    a Markdown table in percent with standard errors). settings: arguments of Subject()."""
    results, lines, columns = [], [], {}
    for title, folder in folders.items():
        subject = Subject(folder, *settings)
        for test in tests:
            answered = run_test(subject, test, limit)
            form = "none" if test.items[0].choices or not subject.alpaca else "alpaca"
            facts = {key: value for key, value in vars(test).items() if key != "items"}
            results.append({"model": folder, **facts, "items_in_file": len(test.items),
                            "limit": limit, "bos": bool(subject.bos), "shots": 0,
                            "template": "alpaca" if test.task == "questions" else form,
                            "dtype": str(settings[0]).split(".")[1], "scores": summary(answered)})
            lines += answered
            for metric, s in results[-1]["scores"].items():
                row = columns.setdefault((f"{test.task}.{test.lang} {metric}", s["n"]), [])
                row.append(f"{100 * s['mean']:.1f} ± {100 * s['stderr']:.1f}")
        del subject                                     # two models may not fit
    rows = [[name, n, *cells] for (name, n), cells in columns.items()]
    return results, lines, markdown(["test", "items", *folders], rows)


def markdown(head: list, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --------------------------------------------------------------------------------------- the layers

def lens_numbers(subject: Subject, args) -> dict:
    """L + 1 numbers each, means over parallel records: the entropy, in nats, at the query's tokens
    in the target language, and in English; and the probabilities, after the target-language prompt,
    of the first token of the target-language and of the English answer, where these differ."""
    rows = [(where, row) for where, row in read_parallel(args.data, args.data_en)
            if args.lang in (None, row.get("lang")) and row.get("output_en")][:args.limit or 32]
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
    numbers = {"entropy": torch.cat(own, 1).mean(1).tolist(),
               "entropy_en": torch.cat(english, 1).mean(1).tolist()}
    if first:
        numbers["p_target"], numbers["p_english"] = torch.stack(first).mean(0).T.tolist()
    i, j, why = choose_layers(numbers["entropy"])
    return dict(n=len(own), pivots=len(first), **numbers, i=i, j=j, why=why, map=own[0].tolist())


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


# ------------------------------------------------------------------------------------- command line

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="Hugging Face model folders")
    add("--prompt", metavar="TEXT", help="answer this one instruction")
    add("--max_new_tokens", type=int, default=256, metavar="N",
        help="longest answer to --prompt and in the chat, in tokens (default: 256)")
    add("--data", metavar="FILE", help="file of --task; without --task, questions to answer")
    add("--data_en", metavar="FILE", help="the English side of --data, for the lens")
    add("--task", nargs="+", default=[], metavar="TASK",
        help="a benchmark, or lens, on --data; or several benchmarks, each written TASK.LANG=FILE")
    add("--lang", help="language of the benchmark (default: en), or of the records to use")
    add("--limit", type=int, metavar="N", help="use the first N items (default: all; lens: 32)")
    add("--bos", default="auto", choices=["auto", "always", "never"],
        help="whether prompts begin with BOS; auto: as the folder's tokenizer does it")
    add("--template", default="auto", choices=["auto", "alpaca", "none"],
        help="the form of prompts (questions: alpaca); auto: as the folder's chat template")
    add("--out", metavar="FILE", help="write the scores and the settings they depend on as JSON")
    add("--items", metavar="FILE", help="write every item with its answer and its scores as JSONL")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the model runs")
    add("--dtype", default="fp32", choices=DTYPES, help="dtype of weights and computation")
    args = parser.parse_args(argv)
    talk = not args.data and not args.task
    if talk and (args.limit or args.out or args.items or args.lang or len(args.model) > 1):
        raise InputError("a chat or --prompt takes one --model and no --limit, --lang, --out or "
                         "--items; to score a model, give --data or --task")
    if args.prompt is not None and not talk:
        raise InputError("--prompt: give it without --data and --task")
    if args.data_en and args.task != ["lens"] or args.items and "lens" in args.task:
        raise InputError("--data_en is for --task lens only, --items for the other tasks only")
    if args.limit is not None and args.limit < 1 or args.max_new_tokens < 1:
        raise InputError("--limit and --max_new_tokens: expected at least 1")
    for path in (args.out, args.items):                     # not after hours of computing
        if path is not None and (os.path.isdir(path) or path == "" or args.out == args.items or
                                 not os.access(os.path.dirname(path) or ".", os.W_OK)):
            raise InputError(f"{path}: expected a file name of its own, in a folder that can be "
                             "written")
    return args


def read_tests(args) -> list:
    """The tests that the command line names."""
    if not args.task:
        tests = [test for test in read_questions(args.data) if args.lang in (None, test.lang)]
        if not tests:
            raise InputError(f"{args.data}: no record has lang {args.lang}")
        return tests
    tests = []
    for spec in args.task:
        name, _, file = spec.partition("=")
        task, _, lang = name.partition(".")
        path = file or args.data
        if task not in TASKS or not path or not file and len(args.task) > 1:
            raise InputError(f"--task {spec}: expected lens or {', '.join(TASKS)} with --data FILE "
                             "and --lang; or several benchmarks, each written TASK.LANG=FILE")
        tests.append(read_test(task, lang or args.lang or "en", path))
    return tests


def main(argv=None) -> None:
    args = parse(argv)
    settings = DTYPES[args.dtype], pick_device(args.device), args.bos, args.template
    if args.task == ["lens"] and args.data:
        return show_lens(args, settings)
    if not args.data and not args.task:
        subject = Subject(args.model[0], *settings)
        if args.prompt is None:
            return subject.chat(args.max_new_tokens)
        return print(subject.answer(args.prompt, args.max_new_tokens))
    folders = {folder: folder for folder in args.model}
    results, lines, table = evaluate(folders, read_tests(args), args.limit, *settings)
    print(table)
    if args.items:
        with open(args.items, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.out:
        write_json(results if len(results) > 1 else results[0], args.out)
        print(f"\nThe scores and their settings are in {args.out}.")


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
