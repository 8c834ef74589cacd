"""data.py: turn parallel text into records of token ids, and records into batches."""
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import sentencepiece

from model import Config, InputError

# Stanford Alpaca's prompt. As in the paper it is English, whatever language the query is in.
HEAD = ("Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n")
HEAD_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that "
                   "provides further context. Write a response that appropriately completes the "
                   "request.\n\n### Instruction:\n")
TAIL = "\n\n### Response:"
LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish",
             "fr": "French", "hi": "Hindi", "ja": "Japanese", "ru": "Russian", "sw": "Swahili",
             "th": "Thai", "vi": "Vietnamese", "zh": "Chinese"}
KEYS = ("instruction", "input", "output")       # of a row; its English side: instruction_en, ...
MAX_TEXT = 10 ** 6                              # characters; tokenising takes 50 times the memory


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


@dataclass(slots=True)
class Record:
    """Token ids of a row. The fields with _en are None (spans (0, 0)) if there is no English side
    or if they are not needed. Ids are arrays of 4 bytes each, as there may be many records."""
    prompt: array                       # begins with BOS if the model's own tokenizer adds it
    answer: array                       # ends with EOS unless it was cut
    query: tuple = (0, 0)               # the query's tokens are prompt[query[0]:query[1]]
    query_en: array | None = None       # the English query without template, BOS and EOS
    answer_en: array | None = None
    prompt_en: array | None = None      # for feature losses
    prompt_en_query: tuple = (0, 0)     # where the English query is in prompt_en


class Counts(Counter):
    """How many rows were read, kept, cut, dropped and so on: {what: number}."""

    def __str__(self):
        parts = [f"{self['kept']:,} of {self['read']:,} records kept"]
        parts += [f"{n:,} {what}" for what, n in self.items() if what not in ("kept", "read")]
        return "; ".join(parts)


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
    counts, records = Counts(read=len(rows)), []
    default_lang = None if any(row.get("output_en") for _, row in rows) else "en"
    for where, row in rows:
        target, english = read_side(where, row, ""), read_side(where, row, "_en")
        lang = read_lang(where, row)
        if side == "english" and (english or (lang or default_lang) != "en"):
            target = english
        if side == "translation" and target:
            source = f"from {LANGUAGES[lang]} " if lang in LANGUAGES else ""
            task = f"Translate the following sentences {source}to English."
            target = english and [task, query_text(target), query_text(english)]
        if target is None:
            counts["dropped: a query or answer is missing"] += 1
            continue
        record = encode_side(target, tokenizer)
        parallel = side == "both" and english is not None
        if parallel:
            other = encode_side(english, tokenizer)
            record.query_en = array("i", tokenizer.encode([query_text(english)])[0])
            record.answer_en = other.answer
            if english_prompt:
                record.prompt_en, record.prompt_en_query = other.prompt, other.query
        room = max_length - len(record.prompt)
        room_en = min(room, max_length - len(record.prompt_en or ()))
        if room_en < 1:
            counts["dropped: prompt too long for --max_length"] += 1
            continue
        whole = [record.answer, record.query_en, record.answer_en]
        record.answer = record.answer[:room]
        if parallel:
            record.query_en, record.answer_en = record.query_en[:room], record.answer_en[:room_en]
        if side == "both":
            counts["with an English side" if parallel else "without a whole English side"] += 1
        if whole != [record.answer, record.query_en, record.answer_en]:
            counts["cut at --max_length"] += 1
        if "joined" in row:
            counts[f"joined {row['joined']}"] += 1
        records.append(record)
        counts["kept"] += 1
    if not records:
        raise InputError(f"{rows[0][0]} and after: nothing to train on: {counts}")
    if side == "both" and not counts["with an English side"]:
        raise InputError(f"{rows[0][0]} and after: no row has an English side: instruction_en and "
                         "output_en, or instruction and output in --data_en; or use --method tft")
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
    counts["English records added"] = len(records)
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


def read_lang(where: str, row: dict) -> str:
    """The language code of a row, "" without one."""
    lang = text_of(where, row, "lang", optional=True)
    if not lang.isprintable():
        raise InputError(f"{where}: 'lang' is {lang!r}, expected a language code")
    return lang


def encode_side(texts: list, tokenizer: "Tokenizer") -> Record:
    """One side as a record of its own. Prompt and answer are tokenised separately, so that it is
    exact where the answer begins; the query is what the prompt does not share with the template."""
    instruction, input, output = texts
    prompt, answer = tokenizer.encode([prompt_text(instruction, input), output])
    head, tail = tokenizer.encode([HEAD_WITH_INPUT if input else HEAD, TAIL])
    first = len(os.path.commonprefix([head, prompt]))               # works on lists, too
    last = len(prompt) - len(os.path.commonprefix([tail[::-1], prompt[::-1]]))
    query = len(tokenizer.bos) + first, len(tokenizer.bos) + max(first, last)
    whole = array("i", tokenizer.bos + prompt), array("i", answer + [tokenizer.eos_id])
    return Record(*whole, query)


# ------------------------------------------------------------------------------------------ batches

def fingerprint(records: list) -> str:
    """A digest of all ids of all records; it changes with the data, tokenizer or truncation."""
    digest = hashlib.sha256()
    for record in records:
        for field in dataclasses.fields(record):
            digest.update(array("q", [*(getattr(record, field.name) or ()), -1]))
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

def read_lines(path: str):
    """The lines of a UTF-8 file one by one, with their line ends."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:       # no split at U+2028
            yield from file
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None


def read_rows(path: str) -> list:
    """A JSONL file or a JSON array of objects -> [(where, object)]: file:line or file[index]."""
    if path.endswith((".csv", ".tsv", ".gz", ".parquet")):
        delimiter = "\\t" if path.endswith(".tsv") else ","
        raise InputError(f"{path}: expected JSONL or a JSON array; decompress .gz with gunzip; "
                         "convert CSV with python -c 'import csv, json, sys; [print(json.dumps(row)"
                         f') for row in csv.DictReader(sys.stdin, delimiter="{delimiter}")]\''
                         " < IN > OUT")
    rows, lines = [], read_lines(path)
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        is_array = not rows and line.lstrip().startswith("[")
        try:
            value = json.loads("".join([line, *lines]) if is_array else line,
                               object_pairs_hook=to_dict)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{n}: malformed JSON: {error}; expected JSONL or a JSON "
                             "array") from None
        for m, row in enumerate(value if is_array else [value]):
            where = f"{path}[{m}]" if is_array else f"{path}:{n}"
            if not isinstance(row, dict):
                raise InputError(f"{where}: found a {type(row).__name__}, expected an object")
            rows.append((where, row))
    if not rows:
        raise InputError(f"{path}: no records in it")
    return rows


def to_dict(pairs: list) -> dict:
    """The keys and values of a JSON object as a dict, unless a key occurs twice."""
    row = {sys.intern(key): value for key, value in pairs}      # rows share the text of their keys
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice in one object")
    return row


def text_of(where: str, row: dict, key: str, optional: bool = False) -> str:
    """row[key], which must be text; if it is optional and missing or null, the empty text."""
    value = "" if optional and row.get(key) is None else row.get(key)
    if not isinstance(value, str) or value.encode("utf-8", "ignore").decode() != value:
        found = json.dumps(value)[:40] if key in row else "missing"
        chat = {"conversations", "messages"} & row.keys()
        hint = " (a chat: convert it to records of an instruction and its output)" if chat else ""
        raise InputError(f"{where}: {key!r} is {found}, expected text; its keys: "
                         f"{json.dumps(list(row))[:200]}{hint}")
    if len(value) > MAX_TEXT:
        raise InputError(f"{where}: {key!r} has {len(value):,} characters; expected at most "
                         f"{MAX_TEXT:,}: is it a whole file, or a book? Split it")
    return value


def read_parallel(path: str, path_en: str | None = None) -> list:
    """Rows of one parallel file, or of a target-language file joined with an English one: by id
    if all rows of both have one, by position if none has. The rows get a key "joined": how."""
    rows = read_rows(path)
    if path_en is None:
        return rows
    rows_en, index, joined = read_rows(path_en), {}, []
    for where, row in rows + rows_en:
        if not isinstance(row.get("id"), (int, str, type(None))) or isinstance(row.get("id"), bool):
            raise InputError(f"{where}: id {row['id']!r}: expected a whole number or a text")
    without = [where for where, row in rows + rows_en if row.get("id") is None]
    if without and not len(without) == 2 * len(rows) == 2 * len(rows_en):
        raise InputError(f"{without[0]}: no id; expected ids in all rows of {path} ({len(rows)}) "
                         f"and {path_en} ({len(rows_en)}), or in none and equally many rows")
    for n, (where, row) in enumerate(rows_en):
        key = n if without else str(row["id"])                      # 7 and "7" are the same id
        if key in index:
            raise InputError(f"{where}: id {key!r} occurs twice, first at {index[key][0]}")
        index[key] = where, row
    how = "by position"
    if not without:
        unused = len(index.keys() - {str(row["id"]) for _, row in rows})
        how = f"by id, {unused:,} English rows not used" if unused else "by id"
    for n, (where, row) in enumerate(rows):
        key = n if without else str(row["id"])
        if key not in index:
            raise InputError(f"{where}: no row of {path_en} has its id, {key!r}")
        where_en, row_en = index[key]
        if any(row.get(f"{name}_en") for name in KEYS):
            raise InputError(f"{where}: has an English side of its own; leave out --data_en")
        row = {**row, "joined": how}
        for name in KEYS:
            row[f"{name}_en"] = text_of(where_en, row_en, name, optional=True)
        joined.append((where, row))
    return joined


# Where to split a text so that Gemma's tokenizer finds no control token in it.
GEMMA_CONTROL = re.compile(
    r"(?<=<)(?=(?:mask|2mass|unused\d+|start_of_turn|end_of_turn)>)|(?<=\[)(?=@BOS@\])")


class Tokenizer:
    """A folder's tokenizer.model, read by sentencepiece, or else its tokenizer.json, read by the
    package tokenizers. Ids are those of transformers, but the text of a special token is plain
    text, never a control token."""

    def __init__(self, config: Config):
        folder, files, self.sp, self.fast = config.folder, config.files, None, None
        spec, settings = config.json_of("tokenizer.json"), config.json_of("tokenizer_config.json")
        try:
            added, self.bos = added_tokens(config, spec, settings), []
            if adds_bos(spec, settings):
                self.bos = [config.bos_token_id]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: tokenizer.json or tokenizer_config.json is malformed "
                             f"({type(error).__name__}: {error})") from None
        if "tokenizer.model" in files:
            self.sp = sentencepiece.SentencePieceProcessor()
            try:
                self.sp.load_from_serialized_proto(files["tokenizer.model"])
            except RuntimeError as error:
                raise InputError(f"{folder}/tokenizer.model: not a sentencepiece model "
                                 f"({error})") from None
            self.size, self.id_of = self.sp.get_piece_size(), self.sp.piece_to_id
            self.gemma = self.id_of("<start_of_turn>") != self.sp.unk_id()
            if self.gemma:                              # its added tokens are pieces of the model
                added = [text for text in added if self.id_of(text) == self.sp.unk_id()]
            if added and not spec:
                raise InputError(f"{folder}: {len(added)} tokens were added to the tokenizer, such "
                                 f"as {added[0]!r}, but there is no tokenizer.json, from which "
                                 "they could be read; save it with transformers' AutoTokenizer")
        if added or self.sp is None:
            if not spec:
                raise InputError(f"{folder}: expected a tokenizer.model or a tokenizer.json in it")
            self.fast = read_fast(f"{folder}/tokenizer.json", files["tokenizer.json"])
            self.size, self.id_of = self.fast.get_vocab_size(), self.fast.token_to_id
            self.gemma = self.id_of("<start_of_turn>") is not None
        if not self.size <= config.vocab_size <= self.size + 1024:      # it may have spare rows
            raise InputError(f"{folder}: the tokenizer has {self.size} ids, but vocab_size in "
                             f"config.json is {config.vocab_size}: they do not belong together")
        end = settings.get("eos_token")                 # a text, or an object with its text
        end = self.id_of(str(end.get("content") if isinstance(end, dict) else end))
        self.bos_id = config.bos_token_id
        self.eos_id = end if end in config.eos_ids else config.eos_ids[0]       # taught in training

    def encode(self, texts: list) -> list:
        """Texts -> a list of ids each, without BOS and EOS."""
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> list:
        ids = []
        for part in GEMMA_CONTROL.split(text) if self.gemma else [text]:
            if self.fast:
                ids += self.fast.encode(part, add_special_tokens=False).ids
            else:
                ids += self.sp.encode(part)
        return ids

    def decode(self, ids: list) -> str:
        """Ids -> text, without control tokens and ids beyond the tokenizer's."""
        ids = [i for i in ids if i < self.size]
        return self.fast.decode(ids) if self.fast else self.sp.decode(ids)


def added_tokens(config: Config, spec: dict, settings: dict) -> list:
    """The texts of the tokens that were added to a tokenizer and are not special. transformers
    finds them in a text before it does anything else."""
    special = json.dumps(config.json_of("special_tokens_map.json"))
    tokens = spec.get("added_tokens") or list(settings.get("added_tokens_decoder", {}).values())
    for text in () if tokens else config.json_of("added_tokens.json"):         # the older form
        tokens.append({"content": text, "special": json.dumps(text) in special})
    return [str(token["content"]) for token in tokens if not token["special"]]


def adds_bos(spec: dict, settings: dict) -> bool:
    """Whether BOS comes before a text: as in transformers 5, the post_processor of tokenizer.json
    decides, without that file add_bos_token in tokenizer_config.json."""
    if not spec:
        adds = settings.get("add_bos_token", True)
        if not isinstance(adds, bool):
            raise TypeError(f"add_bos_token is {adds!r}, expected true or false")
        return adds
    post = spec.get("post_processor") or {}
    templates = [step.get("single") for step in post.get("processors", [post])]
    return any(template and "SpecialToken" in template[0] for template in templates)


def read_fast(path: str, blob: bytes):
    """A tokenizers.Tokenizer that takes the text of special tokens as plain text."""
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{path}: reading it needs a package: pip install tokenizers") from None
    try:
        fast = tokenizers.Tokenizer.from_buffer(blob)
    except Exception as error:                          # tokenizers raises no narrower class
        raise InputError(f"{path}: not a tokenizer.json ({error})") from None
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    return fast
