"""data.py: text to tensors. Tokenizers, parallel records, the prompt, and batches in a reproducible order."""
import base64
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from array import array
from dataclasses import dataclass

import numpy as np
import sentencepiece
import tiktoken

from model import Config, InputError, read_json

# ---------------------------------------------------------------------------------------------- tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same behind a splitter that sets every digit apart, as SmolLM2 has it: a space before a digit stays
# alone.
GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Control tokens that Gemma's sentencepiece model would match inside plain text.
GEMMA_CONTROL = re.compile(r"<(?=(?:mask|2mass|unused\d+|start_of_turn|end_of_turn)>)|\[(?=@BOS@\])")


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.model (sentencepiece, or LLaMA-3's tiktoken ranks), else a
    byte-level BPE tokenizer.json. Ids equal those of transformers without special tokens, except that the
    text of a special token is plain text here, never a control token."""

    def __init__(self, config: Config):
        self.bos_id, self.eos_id = config.bos_id, config.eos_ids[0]
        model, bpe = (os.path.join(config.folder, f) for f in ("tokenizer.model", "tokenizer.json"))
        self.sp = None
        if os.path.exists(model):
            try:
                with open(model, "rb") as file:
                    blob = file.read()
                if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", blob):
                    self._tiktoken(LLAMA3_WORDS, *read_ranks(blob, model))
                else:
                    self.sp = sentencepiece.SentencePieceProcessor(model_proto=blob)
                    self.size = self.sp.get_piece_size()
                    self.sp.id_to_piece(list(range(self.size)))         # an error if one is not UTF-8
            except (RuntimeError, ValueError, OSError) as error:
                raise InputError(f"{model}: neither sentencepiece nor tiktoken ranks ({error})") from None
        elif os.path.exists(bpe):
            self._tiktoken(*read_bpe(read_json(bpe), bpe))
        else:
            raise InputError(f"{config.folder}: no tokenizer.model and no tokenizer.json, expected one")
        # A model may have rows to spare (padding, special tokens: never 1,024 of them), but not too few.
        if not 0 < self.size <= config.vocab_size <= self.size + 1024:
            raise InputError(f"{config.folder}: the tokenizer has {self.size} ids, config.json's vocab_size "
                             f"is {config.vocab_size}: they do not belong together")

    def _tiktoken(self, words: str, ranks: dict, ids: list):
        """ranks: {bytes: merge priority}; ids[rank] is the id of that piece."""
        self.bpe = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        self.ids, self.size = np.array(ids), max(ids) + 1
        self.rank_of = {i: rank for rank, i in enumerate(ids) if i >= 0}

    def encode(self, texts: list) -> list:
        """Texts -> a list of ids each, without BOS or EOS."""
        if self.sp is None:
            ids = (self.ids[np.array(r, dtype=int)] for r in self.bpe.encode_ordinary_batch(texts))
            return [i[i >= 0].tolist() for i in ids]  # transformers, too, drops bytes that it lacks
        out = self.sp.encode(texts, num_threads=os.cpu_count())
        gemma = self.sp["<start_of_turn>"] != self.sp.unk_id()
        for n, text in enumerate(texts):
            cuts = [m.end() for m in GEMMA_CONTROL.finditer(text)] if gemma else []
            if cuts:        # cut behind the bracket; Gemma puts no prefix before the pieces
                out[n] = sum(self.sp.encode([text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]), [])
        return out

    def decode(self, ids: list) -> str:
        """Ids -> text; control tokens and ids beyond the tokenizer's are left out."""
        if self.sp is None:
            return self.bpe.decode([self.rank_of[i] for i in ids if i in self.rank_of], errors="replace")
        return self.sp.decode([i for i in ids if i < self.size])


def read_ranks(blob: bytes, path: str):
    """LLaMA-3's tokenizer.model, lines of "base64 rank" -> ({bytes: rank}, ids), rank and id being one."""
    try:
        pairs = [line.split() for line in blob.splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in pairs}
    except ValueError as error:
        raise InputError(f"{path}: expected lines of base64 and a rank ({error})") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise InputError(f"{path}: expected the ranks 0..{len(pairs) - 1} once each, and all 256 bytes")
    return ranks, list(range(len(pairs)))


def read_bpe(spec, path: str):
    """A byte-level BPE tokenizer.json -> (word pattern, {bytes: merge priority}, ids by priority)."""
    try:
        pre = spec["pre_tokenizer"]
        parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
        kinds = [p["type"] for p in parts]
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            words = GPT2_DIGITS
        elif kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            words = GPT2_WORDS
        elif kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == LLAMA3_WORDS:
            words = LLAMA3_WORDS
        else:
            raise ValueError(f"pre_tokenizer {'+'.join(kinds)}")
        model = spec["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or spec.get("normalizer") or (
                parts[-1].get("add_prefix_space")):
            raise ValueError("a normalizer, a prefix space or a model other than plain BPE")
        # GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        other = [b for b in range(256) if b not in plain]
        byte_of = {**{chr(b): b for b in plain}, **{chr(256 + n): b for n, b in enumerate(other)}}
        char_of = {b: c for c, b in byte_of.items()}
        vocab, ranks, ids = model["vocab"], {}, []
        pieces = [char_of[b] for b in range(256)]       # the bytes first, then the merges by their priority
        pieces += ["".join(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
        for piece in pieces:
            key = bytes(byte_of[c] for c in piece)
            if key not in ranks:
                ranks[key] = len(ids)
                ids.append(int(vocab.get(piece, -1) if len(key) == 1 else vocab[piece]))
        if min(ids) < -1 or max(ids) >= 2 ** 24 or len(set(ids) - {-1}) < len(ids) - ids.count(-1):
            raise ValueError("ids out of range, or of two pieces at once")
        return words, ranks, ids
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(f"{path}: expected a byte-level BPE as of GPT-2, SmolLM2 or LLaMA-3 ("
                         f"{type(error).__name__} {error}); LLaMA-2 and Gemma: tokenizer.model") from None


# ---------------------------------------------------------------------------------------------- records

# Stanford Alpaca's prompt; the query stands in English words whatever its language is, as in the paper.
HEAD = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n")
HEAD_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                   "further context. Write a response that appropriately completes the request."
                   "\n\n### Instruction:\n")
TAIL = "\n\n### Response:"
KEYS = ("instruction", "input", "output")


def prompt_text(instruction: str, input: str) -> str:
    """The Alpaca prompt round a query."""
    if input:
        return f"{HEAD_WITH_INPUT}{instruction}\n\n### Input:\n{input}{TAIL}"
    return f"{HEAD}{instruction}{TAIL}"


@dataclass
class Record:
    """Token ids of one record. Prompts begin with BOS; answers end with EOS unless they were cut. The English
    side is None for a record without one, and for methods that do not use it."""
    prompt: list                    # P: BOS, template and target-language query
    answer: list                    # A
    query_en: list | None = None    # X: the English query without the template, without BOS and EOS
    answer_en: list | None = None   # Y
    prompt_en: list | None = None   # P in English, for the features
    query: tuple = (0, 0)           # where the target-language query lies in the prompt: first, behind last


@dataclass
class Counts:
    """What became of the rows that were read."""
    read: int = 0
    kept: int = 0
    parallel: int = 0               # of those kept, with an English side
    cut: int = 0                    # of those kept, with an end cut off at --max_length
    empty: int = 0                  # dropped: no answer
    long: int = 0                   # dropped: the prompt left no room for an answer

    def __str__(self):
        return (f"{self.kept:,} of {self.read:,} records kept, {self.parallel:,} with an English side; "
                f"{self.cut:,} cut at --max_length; dropped: {self.empty:,} with an empty answer, "
                f"{self.long:,} whose prompt fills --max_length")


def read_text(path: str) -> str:
    """A file of UTF-8, or of gzipped UTF-8 if it is named so."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a file of records") from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def read_rows(path: str) -> list:
    """A JSONL file or a JSON array of objects -> [(place, object)], places are file:line or file[index]."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            rows = [(f"{path}[{n}]", row) for n, row in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: malformed JSON array: {error}") from None
    else:
        rows = []
        for n, line in enumerate(text.split("\n"), 1):      # "\n" alone: U+2028 may stand inside a string
            if line.strip():
                try:
                    rows.append((f"{path}:{n}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}:{n}: malformed JSON: {error}") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: found a {type(row).__name__}, expected an object")
    if not rows:
        raise InputError(f"{path}: no records in it")
    return rows


def read_parallel(path: str, path_en: str | None = None) -> list:
    """Rows of one parallel file, or of a target-language file joined with an English one: by id where every
    row of both has one, else by place where both are equally long."""
    rows = read_rows(path)
    if path_en is None:
        return rows
    rows_en = read_rows(path_en)
    if all("id" in row for _, row in rows + rows_en):
        english = {str(row["id"]): (place, row) for place, row in rows_en}
        for file, its_rows in ((path, rows), (path_en, rows_en)):
            repeated = len(its_rows) - len({str(row["id"]) for _, row in its_rows})
            if repeated:
                raise InputError(f"{file}: {repeated} ids occur more than once")
        missing = [f"{place} (id {row['id']})" for place, row in rows if str(row["id"]) not in english]
        if missing:
            raise InputError(f"{missing[0]}: no record of that id in {path_en}; {len(missing)} such in all")
        pairs = [(place, row, *english[str(row["id"])]) for place, row in rows]
    elif len(rows) == len(rows_en):
        pairs = [(*a, *b) for a, b in zip(rows, rows_en)]
    else:
        raise InputError(f"{path} has {len(rows)} records and {path_en} has {len(rows_en)}: without an id in "
                         "every record they are joined by place, and must be equally long")
    return [(place, {**row, **{f"{key}_en": need(place_en, row_en, key) for key in KEYS}})
            for place, row, place_en, row_en in pairs]


def need(place: str, row: dict, key: str) -> str:
    """row[key], which must be text."""
    value = row.get(key)
    if not isinstance(value, str):
        found = json.dumps(value)[:40] if key in row else "missing"
        raise InputError(f"{place}: {key!r} is {found}, expected text; keys: {', '.join(row) or 'none'}")
    if len(value) > 400_000 and len(max(re.split(r"\S+", value), key=len)) > 400_000:
        # At a million tiktoken's regular expressions panic.
        raise InputError(f"{place}: {key!r} holds a run of more than 400,000 spaces or line ends")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{place}: {key!r} holds half a surrogate pair, which is no text") from None
    return value


def make_records(rows: list, tokenizer: Tokenizer, side: str, max_length: int):
    """Rows -> ([Record], Counts).

    side  "target": target-language prompt and answer; "both": the English side as well, where a row has one;
          "english": the English side is the record (the paper's SFT), or the row itself where it has none.
    Prompt and answer are tokenised apart and their ids concatenated, so that the answer's place is exact.
    Each of the sequences P+A, P+X, P+Y and P_en+Y is cut to max_length at its end.
    """
    counts, texts, parallel = Counts(read=len(rows)), [], []
    for place, row in rows:
        lacks = [f"{key}_en" for key in KEYS if f"{key}_en" not in row]
        if 0 < len(lacks) < len(KEYS):
            raise InputError(f"{place}: {', '.join(lacks)} missing; expected all three *_en keys, or none")
        if side != "target" and lacks and row.get("lang", "en") != "en":
            raise InputError(f"{place}: lang is {row['lang']!r} and {', '.join(lacks)} are missing, from "
                             "which this method learns (--data_en FILE can bring them)")
        target = [need(place, row, key) for key in KEYS]
        english = None if lacks else [need(place, row, f"{key}_en") for key in KEYS]
        if side == "english":
            target, english = english or target, None
        use = english if side == "both" else None
        if not target[2].strip() or use and not use[2].strip():
            counts.empty += 1
            continue
        texts.append(target)
        parallel.append(use)

    with_en = [e for e in parallel if e]
    prompts = tokenizer.encode([prompt_text(i, x) for i, x, _ in texts])
    answers = tokenizer.encode([o for _, _, o in texts])
    english = zip(tokenizer.encode([prompt_text(i, x) for i, x, _ in with_en]),
                  tokenizer.encode([i + ("\n\n" + x if x else "") for i, x, _ in with_en]),
                  tokenizer.encode([o for _, _, o in with_en]))
    heads, (tail,) = tokenizer.encode([HEAD, HEAD_WITH_INPUT]), tokenizer.encode([TAIL])
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    records = []
    for (_, x, _), prompt, answer, en in zip(texts, prompts, answers, parallel):
        first, last = shared(heads[bool(x)], prompt), len(prompt) - shared(tail[::-1], prompt[::-1])
        record = Record(bos + prompt, answer + eos, query=(1 + first, 1 + max(first, last)))
        if en:
            prompt_en, record.query_en, answer_en = next(english)
            record.prompt_en, record.answer_en = bos + prompt_en, answer_en + eos
        room = max_length - max(len(record.prompt), len(record.prompt_en or []))
        if room < 1:
            counts.long += 1
            continue
        before = record.answer, record.query_en, record.answer_en
        record.answer = record.answer[:max_length - len(record.prompt)]
        if en:
            record.query_en = record.query_en[:max_length - len(record.prompt)]
            record.answer_en = record.answer_en[:room]
        counts.cut += before != (record.answer, record.query_en, record.answer_en)
        counts.parallel += bool(en)
        records.append(record)
    counts.kept = len(records)
    if not records:
        raise InputError(f"{rows[0][0]} and on: nothing left to train on: {counts}")
    return records, counts


def shared(a: list, b: list) -> int:
    """How many items two lists have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------- batches

def fingerprint(records: list) -> str:
    """A digest of all ids of all records in their order: other data, tokenizers or cuts give another one."""
    ids = hashlib.sha256()
    for record in records:
        for part in vars(record).values():
            ids.update(array("q", [*(part or ()), -1]))
    return ids.hexdigest()[:16]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in n records; the last one may be smaller, and none is left out."""
    return math.ceil(n / batch_size)


def batch_of(step: int, n: int, batch_size: int, seed: int) -> list:
    """Indexes of the records of a step (from 0): a pure function, so a run can begin anywhere. RandomState's
    stream is frozen by numpy, unlike default_rng's."""
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    order = np.random.RandomState([seed % 2 ** 32, epoch]).permutation(n)
    return order[place * batch_size:(place + 1) * batch_size].tolist()


def micro_batches(sizes: list, budget: int, ranks: int) -> list:
    """Places 0..len(sizes)-1 dealt into as few equally heavy micro-batches of at most `budget` tokens as can
    be, their number a multiple of `ranks` (micro-batch m is rank m % ranks's). A record above the budget
    stands alone. With fewer records than ranks some are empty. Tokens are laid end to end, so nothing is
    padded whatever the lengths."""
    heaviest_first = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    count = ranks * math.ceil(max(1, sum(min(size, budget) for size in sizes) / budget) / ranks)
    while True:
        bins, loads = [[] for _ in range(count)], [0] * count
        for n in heaviest_first:
            lightest = loads.index(min(loads))
            bins[lightest].append(n)
            loads[lightest] += sizes[n]
        if all(load <= budget or len(b) == 1 for b, load in zip(bins, loads)):
            return bins
        count += ranks
