"""data.py: turn parallel text into records of token ids, and records into batches."""
import gzip
import hashlib
import json
import math
import os
import re
from array import array
from dataclasses import dataclass

import numpy as np
import sentencepiece
import tiktoken

from model import Config, InputError, read_json

# Stanford Alpaca's prompt. As in the paper it is English, whatever language the query is in.
HEAD = ("Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n")
HEAD_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that "
                   "provides further context. Write a response that appropriately completes the "
                   "request.\n\n### Instruction:\n")
TAIL = "\n\n### Response:"
LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "de": "German", "es": "Spanish", "fr": "French",
             "hi": "Hindi", "ja": "Japanese", "ru": "Russian", "sw": "Swahili", "th": "Thai",
             "vi": "Vietnamese", "zh": "Chinese"}
KEYS = ("instruction", "input", "output")       # of a row; its English side: instruction_en, ...


def prompt_text(instruction: str, input: str) -> str:
    """The Alpaca prompt around a query."""
    if input:
        return f"{HEAD_WITH_INPUT}{instruction}\n\n### Input:\n{input}{TAIL}"
    return f"{HEAD}{instruction}{TAIL}"


def chat_template(bos: bool) -> str:
    """The Jinja template of an exported model: prompt_text(user message, ""), after BOS if bos."""
    check = ("{% if messages|length != 1 or messages[0]['role'] != 'user' "
             "or messages[0]['content'] is not string %}"
             "{{ raise_exception('This model was trained on single questions: pass exactly one "
             "user message of text, no system message and no earlier turns.') }}{% endif %}")
    return check + "{{ bos_token }}" * bos + prompt_text("{{ messages[0]['content'] }}", "")


@dataclass
class Record:
    """Token ids of a row. The fields with _en are None (spans (0, 0)) if there is no English side
    or if they are not needed."""
    prompt: list                        # begins with BOS if the model's own tokenizer adds it
    answer: list                        # ends with EOS unless it was cut
    query: tuple = (0, 0)               # the query's tokens are prompt[query[0]:query[1]]
    query_en: list | None = None        # the English query without template, BOS and EOS
    answer_en: list | None = None
    prompt_en: list | None = None       # for feature losses
    prompt_en_query: tuple = (0, 0)     # where the English query is in prompt_en


@dataclass
class Counts:
    """How many rows were kept, cut or dropped."""
    read: int = 0
    kept: int = 0
    parallel: int = 0       # of those kept: with an English side
    target_only: int = 0    # of those kept: without a whole one, although the method uses it
    cut: int = 0            # of those kept: with an end cut off at --max_length
    empty: int = 0          # dropped: no query or no answer
    long: int = 0           # dropped: the prompt leaves no room for an answer
    english: int = 0        # English sides that were added as records of their own
    joined: str = ""        # how two files were joined: "by id" or "by position"

    def __str__(self):
        joined = f", joined {self.joined}" if self.joined else ""
        parts = [(self.parallel, "with an English side"), (self.target_only, "without a whole one"),
                 (self.english, "English records added"), (self.cut, "cut at --max_length"),
                 (self.empty, "dropped: a query or answer is missing"),
                 (self.long, "dropped: prompt too long for --max_length")]
        text = [f"{self.kept:,} of {self.read:,} records kept{joined}"]
        return "; ".join(text + [f"{number:,} {what}" for number, what in parts if number])


def make_records(rows: list, tokenizer: "Tokenizer", side: str, max_length: int,
                 english_prompt: bool = True):
    """Rows -> ([Record], Counts).

    side  the "target" language; "both"; "english": the English side as the record (paper: SFT);
          "translation": translate the query into English (Zhu et al. 2024, question alignment).
    english_prompt  with "both": add prompt_en, which only feature losses need.

    Without an English side a row of "both" becomes a target-only record. A row of "english" is
    then dropped, unless it is English itself: lang is "en", or missing and no row has output_en.
    Answers and the English query are cut so that with each prompt they fit max_length tokens.
    """
    counts, records = Counts(read=len(rows), joined=rows[0][1].get("joined", "")), []
    default_lang = None if any(row.get("output_en") for _, row in rows) else "en"
    for where, row in rows:
        target, english = read_side(where, row, ""), read_side(where, row, "_en")
        if side == "english" and (english or (row.get("lang") or default_lang) != "en"):
            target = english
        if side == "translation" and target:
            source = f"from {LANGUAGES[row['lang']]} " if str(row.get("lang")) in LANGUAGES else ""
            task = f"Translate the following sentences {source}to English."
            target = english and [task, query_text(target), query_text(english)]
        if target is None:
            counts.empty += 1
            continue
        record = encode_side(target, tokenizer)
        parallel = side == "both" and english is not None
        if parallel:
            other = encode_side(english, tokenizer)
            record.query_en = tokenizer.encode([query_text(english)])[0]
            record.answer_en = other.answer
            if english_prompt:
                record.prompt_en, record.prompt_en_query = other.prompt, other.query
        room = max_length - len(record.prompt)
        room_en = min(room, max_length - len(record.prompt_en or []))
        if room_en < 1:
            counts.long += 1
            continue
        whole = [record.answer, record.query_en, record.answer_en]
        record.answer = record.answer[:room]
        if parallel:
            record.query_en, record.answer_en = record.query_en[:room], record.answer_en[:room_en]
        elif side == "both":
            counts.target_only += 1
        counts.cut += whole != [record.answer, record.query_en, record.answer_en]
        counts.parallel += parallel
        records.append(record)
    counts.kept = len(records)
    if not records:
        raise InputError(f"{rows[0][0]} and after: nothing to train on: {counts}")
    return records, counts


def english_records(rows: list, tokenizer: "Tokenizer", max_length: int, share: float, seed: int,
                    counts: Counts) -> list:
    """A share of the distinct English sides of rows, each as a record of its own."""
    distinct, records = {}, []
    for where, row in rows:
        side = read_side(where, row, "_en")
        if side:
            distinct[tuple(side)] = None
    sides = list(distinct)
    order = np.random.RandomState([seed % 2 ** 32, len(sides)]).permutation(len(sides))
    for n in sorted(order[:round(share * len(sides))]):
        record = encode_side(sides[n], tokenizer)
        record.answer = record.answer[:max(0, max_length - len(record.prompt))]
        records += [record] if record.answer else []
    counts.english = len(records)
    return records


def query_text(texts: list) -> str:
    """The query of a side: instruction and, after a blank line, the input if there is one."""
    return "\n\n".join(text for text in texts[:2] if text)


def read_side(where: str, row: dict, suffix: str) -> list | None:
    """[instruction, input, output] of a row, with suffix "_en" its English side; None without a
    query (instruction or input) or an output. Missing, null and blank are the same, but the
    instruction and output of the target side must be text."""
    texts = [text_of(where, row, key + suffix, bool(suffix) or key == "input") for key in KEYS]
    return texts if (texts[0] + texts[1]).strip() and texts[2].strip() else None


def encode_side(texts: list, tokenizer: "Tokenizer") -> Record:
    """One side as a record of its own. Prompt and answer are tokenised separately, so that it is
    exact where the answer begins; the query is what the prompt does not share with the template."""
    instruction, input, output = texts
    prompt, answer = tokenizer.encode([prompt_text(instruction, input), output])
    head, tail = tokenizer.encode([HEAD_WITH_INPUT if input else HEAD, TAIL])
    first = len(os.path.commonprefix([head, prompt]))               # works on lists, too
    last = len(prompt) - len(os.path.commonprefix([tail[::-1], prompt[::-1]]))
    query = len(tokenizer.bos) + first, len(tokenizer.bos) + max(first, last)
    return Record(tokenizer.bos + prompt, answer + [tokenizer.eos_id], query)


# ------------------------------------------------------------------------------------------ batches

def fingerprint(records: list) -> str:
    """A digest of all ids of all records; it changes with the data, tokenizer or truncation."""
    digest = hashlib.sha256()
    for record in records:
        for part in vars(record).values():
            digest.update(array("q", [*(part or ()), -1]))
    return digest.hexdigest()[:16]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in n records; the last one may be smaller."""
    return math.ceil(n / batch_size)


def batch_of(step: int, n: int, batch_size: int, seed: int) -> list:
    """Indices of the records of a step, counted from 0: a pure function, so that a run can resume
    at any step. numpy keeps RandomState's stream stable, unlike default_rng's."""
    epoch, batch = divmod(step, steps_per_epoch(n, batch_size))
    order = np.random.RandomState([seed % 2 ** 32, epoch]).permutation(n)
    return order[batch * batch_size:(batch + 1) * batch_size].tolist()


def micro_batches(sizes: list, budget: int, ranks: int) -> list:
    """Indices of sizes in as few, equally large micro-batches of at most `budget` tokens as
    possible, their number a multiple of `ranks`: number m is for rank m % ranks. A record above
    the budget gets a micro-batch of its own; with fewer records than ranks some are empty."""
    largest_first = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    tokens = sum(min(size, budget) for size in sizes)
    count = ranks * math.ceil(max(1, tokens / budget) / ranks)
    while True:
        batches, totals = [[] for _ in range(count)], [0] * count
        for n in largest_first:
            smallest = totals.index(min(totals))
            batches[smallest].append(n)
            totals[smallest] += sizes[n]
        if all(total <= budget or len(b) == 1 for b, total in zip(batches, totals)):
            return batches
        count += ranks


# --------------------------------------------------------------- supporting code: files, tokenizers

def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of one that is compressed as .gz, with its line ends."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(
                path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a text file") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def read_rows(path: str) -> list:
    """A JSONL file or a JSON array of objects -> [(where, object)]: file:line or file[index]."""
    text, rows = read_text(path), []
    if path.endswith((".csv", ".tsv")):
        raise InputError(f"{path}: expected JSONL or a JSON array; convert CSV with python -c "
                         "'import csv, json, sys; [print(json.dumps(row)) for row in "
                         "csv.DictReader(sys.stdin)]' < IN > OUT")
    array = text.lstrip()[:1] == "["
    for n, line in enumerate([text] if array else text.split("\n"), 1):    # not at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=to_dict)
        except ValueError as error:
            raise InputError(f"{path}:{n}: malformed JSON: {error}; expected JSONL or a JSON "
                             "array") from None
        for m, row in enumerate(value if array else [value]):
            where = f"{path}[{m}]" if array else f"{path}:{n}"
            if not isinstance(row, dict):
                raise InputError(f"{where}: found a {type(row).__name__}, expected an object")
            rows.append((where, row))
    if not rows:
        raise InputError(f"{path}: no records in it")
    return rows


def to_dict(pairs: list) -> dict:
    """The keys and values of a JSON object as a dict, unless a key occurs twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice in one object")
    return dict(pairs)


def text_of(where: str, row: dict, key: str, optional: bool = False) -> str:
    """row[key], which must be text; if it is optional and missing or null, the empty text."""
    value = "" if optional and row.get(key) is None else row.get(key)
    if not isinstance(value, str) or value.encode("utf-8", "ignore").decode() != value:
        found = json.dumps(value)[:40] if key in row else "missing"
        chat = {"conversations", "messages"} & row.keys()
        hint = " (a chat record: convert each question and its answer)" if chat else ""
        keys = ", ".join(row) + hint
        raise InputError(f"{where}: {key!r} is {found}, expected text; keys: {keys}")
    return value


def read_parallel(path: str, path_en: str | None = None) -> list:
    """Rows of one parallel file, or of a target-language file joined with an English one: by id
    if all rows of both have one, by position if none has. The rows get a key "joined": how."""
    rows = read_rows(path)
    if path_en is None:
        return rows
    rows_en, index, joined = read_rows(path_en), {}, []
    without = [where for where, row in rows + rows_en if row.get("id") is None]
    if without and not len(without) == 2 * len(rows) == 2 * len(rows_en):
        raise InputError(f"{without[0]}: no id; expected ids in all rows of {path} ({len(rows)}) "
                         f"and {path_en} ({len(rows_en)}), or in none and equally many rows")
    for n, (where, row) in enumerate(rows_en):
        key = n if without else str(row["id"])                      # 7 and "7" are the same id
        if key in index:
            raise InputError(f"{where}: id {key!r} occurs twice, first at {index[key][0]}")
        index[key] = where, row
    for n, (where, row) in enumerate(rows):
        key = n if without else str(row["id"])
        if key not in index:
            raise InputError(f"{where}: no row of {path_en} has its id, {key!r}")
        where_en, row_en = index[key]
        row = {**row, "joined": "by position" if without else "by id"}
        for name in KEYS:
            row[f"{name}_en"] = text_of(where_en, row_en, name, optional=True)
        joined.append((where, row))
    return joined


# How a byte-level BPE splits a text into words. SmolLM2 splits off every digit before that.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"\p{N}|\s+(?=\p{N})|" + GPT2_WORDS
# Where to split a text so that Gemma's sentencepiece model finds no control token in it.
GEMMA_CONTROL = re.compile(
    r"(?<=<)(?=(?:mask|2mass|unused\d+|start_of_turn|end_of_turn)>)|(?<=\[)(?=@BOS@\])")


class Tokenizer:
    """A folder's tokenizer.model (sentencepiece), else its tokenizer.json (byte-level BPE). Ids are
    those of transformers, but the text of a special token is plain text, never a control token."""

    def __init__(self, config: Config):
        folder, self.bpe, self.gemma = config.folder, None, False
        path, spec = f"{folder}/tokenizer.model", optional_json(folder, "tokenizer.json")
        settings = optional_json(folder, "tokenizer_config.json")
        if os.path.exists(path):
            try:
                self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
            except RuntimeError as error:
                raise InputError(f"{path}: not a sentencepiece model ({error})") from None
            self.size = self.sp.get_piece_size()
            self.gemma = self.sp["<start_of_turn>"] != self.sp.unk_id()
        elif spec:
            self.bpe, self.known, self.size = read_bpe(spec, folder)
        else:
            raise InputError(f"{folder}: expected a tokenizer.model or a tokenizer.json in it")
        named = json.dumps(optional_json(folder, "special_tokens_map.json"))
        added = settings.get("added_tokens_decoder", {}).values() or [      # else the older form:
            {"content": text, "special": json.dumps(text) in named}
            for text in optional_json(folder, "added_tokens.json")]
        for token in [*added, *spec.get("added_tokens", [])]:   # transformers finds them in a text
            text = token["content"]                             # first; Gemma's model has its own
            if not token["special"] and not (self.gemma and self.sp[text] != self.sp.unk_id()):
                raise InputError(f"{folder}: the tokenizer has an added token, {text!r}, which is "
                                 "not supported; use the tokenizer of the base model")
        if not self.size <= config.vocab_size <= self.size + 1024:      # it may have spare rows
            raise InputError(f"{folder}: the tokenizer has {self.size} ids, but vocab_size in "
                             f"config.json is {config.vocab_size}: they do not belong together")
        self.bos_id, self.eos_id = config.bos_token_id, config.eos_ids[0]
        self.bos = [self.bos_id] if adds_bos(spec, settings) else []

    def encode(self, texts: list) -> list:
        """Texts -> a list of ids each, without BOS and EOS."""
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> list:
        if self.bpe:        # transformers, too, drops bytes that the vocabulary lacks
            return [i for i in self.bpe.encode_ordinary(text) if i < self.size]
        ids = []
        for part in GEMMA_CONTROL.split(text) if self.gemma else [text]:
            ids += self.sp.encode(part)
        return ids

    def decode(self, ids: list) -> str:
        """Ids -> text, without control tokens and ids beyond the tokenizer's."""
        if self.bpe:
            return self.bpe.decode([i for i in ids if i in self.known], errors="replace")
        return self.sp.decode([i for i in ids if i < self.size])


def optional_json(folder: str, name: str) -> dict:
    """The JSON object in a file, {} without the file."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}


def adds_bos(spec: dict, settings: dict) -> bool:
    """Whether BOS comes before a text: as in transformers 5, the post_processor of tokenizer.json
    decides, without that file add_bos_token in tokenizer_config.json."""
    if not spec:
        return settings.get("add_bos_token", True)
    post = spec.get("post_processor") or {}
    templates = [step.get("single") for step in post.get("processors", [post])]
    return any(template and "SpecialToken" in template[0] for template in templates)


def read_bpe(spec: dict, folder: str):
    """A byte-level BPE tokenizer.json -> (tiktoken.Encoding, set of its ids, number of ids)."""
    try:
        vocab, pre = spec["model"]["vocab"], spec["pre_tokenizer"]
        steps = pre.get("pretokenizers", [pre])
        kinds = " ".join(step["type"] for step in steps)
        words = {"ByteLevel": GPT2_WORDS, "Digits ByteLevel": GPT2_DIGITS}.get(kinds)
        if kinds == "Split ByteLevel":                          # LLaMA-3
            words = steps[0]["pattern"]["Regex"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        tokens = ["".join(merge) for merge in merges]
        ids = [vocab[token] for token in tokens]
        if (not words or spec["normalizer"] or steps[-1]["add_prefix_space"] or ids != sorted(ids)
                or len(set(vocab.values())) < len(vocab)):
            raise ValueError(f"pre_tokenizer {kinds}, a normalizer, or other ids or merges")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/tokenizer.json: expected a byte-level BPE as of GPT-2, SmolLM2 "
                         "or LLaMA-3; LLaMA-2 and Gemma need their file tokenizer.model "
                         f"({type(error).__name__}: {error})") from None
    # GPT-2's table: a printable byte is its own character, the others are numbered from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(other)}
    size = max(vocab.values()) + 1
    ranks = {bytes([b]): vocab.get(char, size + b) for char, b in byte_of.items()}
    for token in tokens:
        ranks[bytes(byte_of[char] for char in token)] = vocab[token]
    bpe = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    return bpe, {i for i in ranks.values() if i < size}, size
