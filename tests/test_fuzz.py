"""Damaged inputs: each loads and works, or ends in an InputError of one line; no other exception, no hang, no
large allocation, and nothing of a file is ever run.

    python -m pytest tests/test_fuzz.py
    FUZZ_CASES=2000 python -m pytest -s tests/test_fuzz.py                  so many of each kind, and a table

The cases run in a process of their own, which forks again after a crash of native code: that is a failure
like others, named by its seed. One case once more, with its traceback:

    python tests/test_fuzz.py KIND FOLDER SEED                                       FOLDER: an empty one
"""
import argparse
import base64
import collections
import contextlib
import dataclasses
import json
import math
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                               # the process of the cases has no conftest.py

import torch  # noqa: E402
import train  # noqa: E402
from data import Tokenizer, make_records, read_parallel  # noqa: E402
from dft import DFT, Method  # noqa: E402
from model import Config, InputError, Tokens, Transformer, generate, load, save  # noqa: E402

CASES = int(os.environ.get("FUZZ_CASES", 120))
SECONDS, MIB = 20, 200                                      # that one case may take
MARKER = "code-was-run"
DEMO = ROOT / "demo" / "model"


# ------------------------------------------------------------------------------------------ damage

def nested(depth, inner=0, key=None):
    """Lists, or objects, one in another, as text."""
    opening, closing = ("[", "]") if key is None else (f'{{"{key}":', "}")
    return opening * depth + str(inner) + closing * depth


# Text in the place of a JSON value.
JUNK = ["null", "true", "false", "0", "-1", "1", "7", "1.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999",
        "1e308", "1e-320", str(2 ** 30), str(2 ** 31 - 1), str(2 ** 31), str(2 ** 64), "1" * 4000,
        "1" * 10_000, "1." + "3" * 10_000, "[]", "{}", "[1]", "[[]]", '[{"a": 1}]', '{"a": [1]}', '""', '"x"',
        '"1"', '"1e-5"', '"a\\nb\\u001b[2J\\u2028c"', '"\\ud800"', '"\\u0000"', '"../x"',
        '"%s"' % ("y" * 5000), nested(90), nested(90, key="a"), nested(100_000), nested(100_000, key="a"),
        "[" * 100_000, '{"a":1,"a":[2],"a":"3"}', "[" + "1," * 999 + "1]", "nan", "'",
        '["sliding_attention", "full_attention"]', '{"rope_type": "llama3"}']


def damaged_json(rng, value):
    """(JSON text of a value with something in it deleted, added or replaced by junk, what it was)."""
    value, path, junk = json.loads(json.dumps(value)), [], "\u0001junk"
    holder, key = {"": value}, ""
    while isinstance(holder[key], (dict, list)) and holder[key] and (not path or rng.random() < 0.8):
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        path.append(key)
    new = rng.choice(JUNK)
    how = rng.choice(["delete", "add", "move", "junk", "junk", "junk", "junk", "junk"])
    if how == "delete":
        del holder[key]
    elif how == "move" and isinstance(holder, dict):        # a value under another's key, or a strange one
        holder[rng.choice([*holder, "", "a\nb", "\ud800", "x" * 300])] = holder.pop(key)
    elif how == "add" and isinstance(holder, dict):
        holder[rng.choice(["", "a\nb\x1b[2J", "\ud800", "x" * 300])] = junk
    elif rng.random() < 0.2 and type(holder[key]) in (int, float):
        holder[key] = new = rng.choice([-holder[key], holder[key] + 1, holder[key] * 2, holder[key] // 2])
    else:
        holder[key] = junk
    text = json.dumps(value).replace(json.dumps(junk), new if isinstance(new, str) else "0")
    return text.encode(), f"{how} at {path} {str(new)[:40]!r}"


def damaged_bytes(rng, blob):
    """(bytes with a few of them changed, lost, doubled or put in, or other bytes altogether, what it was)."""
    how = rng.choice(["flip", "flip", "flip", "cut", "lose", "double", "put in", "other"])
    blob, a = bytearray(blob), rng.randrange(len(blob) + 1)
    b = min(len(blob), a + rng.choice([1, 2, 8, 100, 3000]))
    if how == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            blob[rng.randrange(len(blob))] = rng.choice([0, 10, 34, 127, 128, 255, rng.randrange(256)])
    elif how == "cut":
        del blob[a:]
    elif how == "lose":
        del blob[a:b]
    elif how == "double":
        blob[a:a] = blob[a:b]
    elif how == "put in":
        blob[a:a] = rng.choice([b"\0", b"\n", b"\r", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b",",
                                b"[", b"}", b"\x1b[2J", b"9" * 10_000, rng.randbytes(9)])
    else:
        blob = rng.choice([b"", b"\0", b"\n", b"\xff\xfe{}", b"\x80", b"PK\x03\x04", rng.randbytes(500),
                           rng.choice(JUNK).encode(), b"\xef\xbb\xbf" + bytes(blob)])
    return bytes(blob), f"{how} at {a}..{b}"


class Bomb:
    """Pickled: opens a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


# ------------------------------------------------------------------------------------------ models

TINY = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
BASES = {
    "llama": dict(TINY, model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama3": dict(TINY, model_type="llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "gemma2": dict(TINY, model_type="gemma2", query_pre_attn_scalar=4, sliding_window=3, eos_token_id=[1, 2],
                   layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=50.0,
                   final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh"),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
INDEX = "model.safetensors.index.json"


def write_bases(folder):
    """Folders of tiny models to damage: two of one file, one of shards, and the shipped one."""
    for name, raw in BASES.items():
        os.makedirs(folder / name)
        (folder / name / "config.json").write_text(json.dumps(raw))
        model = Transformer(Config.read(str(folder / name)))
        save(model, str(folder / name), shard_bytes=2000 if name == "gemma2" else 10 ** 9)
    shutil.copytree(DEMO, folder / "demo")
    write_run(folder / "run", folder / "llama")


def damage_model(rng, work):
    """A damaged copy of a model folder -> (its path, what was done)."""
    name = rng.choice([*BASES] * 5 + ["demo"])
    folder, marker = work / "case", str(work / MARKER)
    shutil.copytree(work / "bases" / name, folder)
    weights = rng.choice(sorted(folder.glob("*.safetensors")))
    blob = weights.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header, tensors = json.loads(blob[8:8 + size]), blob[8 + size:]
    config, index = folder / "config.json", folder / INDEX
    how = rng.choice(["config", "config", "config", "config text", "huge", "cut", "length", "header",
                      "header", "header text", "offsets", "tensor", "dtype", "shape", "index", "index text",
                      "index to", "type", "pickle", "code"])
    if how == "config":
        text, what = damaged_json(rng, json.loads(config.read_text()))
        config.write_bytes(text)
    elif how == "config text":
        text, what = damaged_bytes(rng, config.read_bytes())
        config.write_bytes(text)
    elif how == "huge":
        what = {key: 2 ** rng.choice([16, 20, 24, 30]) for key in rng.sample(SIZES, rng.choice([1, 1, 2, 9]))}
        config.write_text(json.dumps({**json.loads(config.read_text()), **what}))
    elif how == "cut":
        what = rng.choice([rng.randrange(len(blob)), rng.randrange(size + 9), len(blob) - 1])
        os.truncate(weights, what)
    elif how == "length":
        what = rng.choice([0, 1, size - 1, size + 1, len(blob), 10 ** 8, 2 ** 31, 2 ** 32 + size, 2 ** 63,
                           2 ** 64 - 1, 2 ** 64 - 8, rng.randrange(2 ** 64)])
        weights.write_bytes(struct.pack("<Q", what) + blob[8:])
    elif how in ("header", "header text"):
        text, what = damaged_json(rng, header) if how == "header" else damaged_bytes(rng, blob[8:8 + size])
        weights.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    elif how in ("offsets", "tensor", "dtype", "shape"):
        names = [n for n in header if n != "__metadata__"]
        what = n = rng.choice(names)
        if how == "offsets":
            others = header[rng.choice(names)]["data_offsets"]
            header[n]["data_offsets"] = rng.choice([
                others, others[::-1], [0, 0], [0, 2 ** 63], [-4, 0], [9, 3], [0.5, 1], [0, len(tensors)],
                [len(tensors), 2 * len(tensors)], [2 ** 64] * 2])
        elif how == "tensor":
            new = rng.choice(["", "x", "a\nb\x1b[31m", "lm_head.weight", "model.rotary_emb.inv_freq", "\0",
                              n + " "])
            header = {new if key == n else key: value for key, value in header.items()}
        elif how == "dtype":
            new, bits = rng.choice([("F16", 16), ("BF16", 16), ("F32", 32), ("F64", 64), ("I8", 8),
                                    ("I64", 64), ("F8_E4M3", 8), ("F8_E8M0", 8), ("F6_E2M3", 6),
                                    ("F4", 4), ("C64", 64), ("BOOL", 8), ("f32", 32), ("", 8), (None, 8)])
            header[n]["dtype"], what = new, f"{n} {new}"
            tied = "model.embed_tokens.weight"
            if rng.random() < 0.5 and tied in header:       # alone, with sizes that agree; and the tied head
                span = math.prod(header[tied]["shape"]) * bits // 8
                header = {name: dict(dtype=new, shape=header[tied]["shape"], data_offsets=[a, a + span])
                          for name, a in ((tied, 0), ("lm_head.weight", span))}
                tensors = bytes(2 * span)
        else:
            new = [[], [0], [1], header[n]["shape"] + [1], header[n]["shape"][::-1], [2 ** 40, 2 ** 40],
                   [math.prod(header[n]["shape"])], [2 ** 64, 0], [-1, -8], [0, 2 ** 62]]
            header[n]["shape"] = rng.choice(new)
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    elif how.startswith("index"):
        spec = dict(metadata={}, weight_map={n: weights.name for n in header if n != "__metadata__"})
        spec = json.loads(index.read_text()) if index.exists() else spec
        if how == "index to":
            shutil.copyfile(weights, work / "outside.safetensors")
            what = rng.choice(["../outside.safetensors", str(work / "outside.safetensors"), "", "..", None, 7,
                               "gone.safetensors", "a\nb.safetensors", "\0.safetensors", ".safetensors", [],
                               "\ud800.safetensors", "x" * 5000 + ".safetensors", "pytorch_model.bin",
                               "case.safetensors"])
            os.mkdir(folder / "case.safetensors")
            keys = list(spec["weight_map"])
            keys = keys if rng.random() < 0.5 else [rng.choice(keys)]
            spec["weight_map"].update(dict.fromkeys(keys, what))
            text = json.dumps(spec).encode()
        else:
            text, what = (damaged_json(rng, spec) if how == "index" else
                          damaged_bytes(rng, json.dumps(spec).encode()))
        index.write_bytes(text)
    elif how == "type":                 # a folder for a file, a file for the folder, a link in a circle
        what = (rng.choice([config, weights, index, folder]),
                rng.choice(["folder", "file", "nothing", "circle"]))
        if what[0].is_dir():
            shutil.rmtree(what[0])
        else:
            what[0].unlink(missing_ok=True)
        if what[1] == "folder":
            what[0].mkdir()
        elif what[1] == "file":
            what[0].write_text("x")
        elif what[1] == "circle":
            what[0].symlink_to(what[0])
        what = what[0].name, what[1]
    elif how == "pickle":
        what = rng.choice(["model.safetensors", weights.name, "config.json", INDEX, "pytorch_model.bin",
                           "model.pt", "training_args.bin"]), rng.random() < 0.5
        if what[1]:
            weights.unlink()
        bomb = pickle.dumps(Bomb(marker), protocol=rng.choice([0, 2, 4]))
        (folder / what[0]).write_bytes(bomb)
    else:
        what = rng.choice(["modeling_evil", "torch", "safetensors", "config", "__init__", "conftest"])
        (folder / f"{what}.py").write_text(f"open({marker!r}, 'w')\n")
        evil = dict(auto_map={"AutoConfig": f"{what}.Config", "AutoModelForCausalLM": f"{what}.Model"},
                    architectures=["Evil"], trust_remote_code=True)
        config.write_text(json.dumps({**json.loads(config.read_text()), **evil}))
    return str(folder), f"{name}, {how}: {what}"


def use_model(rng, work):
    folder, what = damage_model(rng, work)
    yield what
    model = load(folder)
    c = model.config
    x = model(Tokens.plain([[0, 1, c.bos_id, *c.eos_ids]], c.num_layers), (c.num_layers,))[c.num_layers]
    assert model.logits(x).shape == (len(x), c.vocab_size)
    if c.max_positions > 2:
        (ids,) = generate(model, [[0, 1]], 2)
        assert all(0 <= i < c.vocab_size for i in ids)


# ------------------------------------------------------------------------------------------ records

def record(n, **keys):
    return dict(id=n, lang="vi", instruction=f"Thủ đô {n}?", input="Pháp" * (n % 2), output=f"Hà Nội {n}",
                instruction_en=f"Capital {n}?", input_en="France" * (n % 2), output_en=f"Hanoi {n}", **keys)


def dumped(rows, array):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return (f"[{', '.join(lines)}]" if array else "\n".join(lines)).encode()


def damage_records(rng, work):
    """A damaged file of records, at times with an English one -> (paths, what was done)."""
    rows, array, files = [record(n) for n in range(4)], rng.random() < 0.4, ["rows.json"]
    english = [{k.removesuffix("_en"): row[k] for k in ("id", "instruction_en", "input_en", "output_en")}
               for row in rows]
    if rng.random() < 0.3:
        (work / "rows.json").write_bytes(dumped(rows, False))
        (work / "en.json").write_bytes(dumped(english, array))
        files, rows = ["rows.json", "en.json"], rng.choice([rows, english])
    file = work / (files[-1] if rows is english else files[0])
    how = rng.choice(["value", "value", "value", "text", "text", "deep", "long", "type"])
    if how == "value":
        text, what = damaged_json(rng, rows)
        if not array:                                       # one object a line
            text = text[1:-1].replace(b"}, {", b"}\n{")
    elif how == "text":
        text, what = damaged_bytes(rng, dumped(rows, array))
    elif how == "deep":                                     # where reading just succeeds, if it does
        what = rng.choice(["id", "lang", "instruction", "output_en", "more"]), rng.randrange(900, 1010)
        rows = [dict(rows[0], **{what[0]: "deep"})] + rows[1:]
        if rng.random() < 0.3:
            rows[0].pop("instruction_en", None)
        text = dumped(rows, array).replace(b'"deep"', nested(what[1], key=rng.choice([None, "a"])).encode())
    elif how == "long":
        what = (rng.choice([" ", "a", "\n", "^", "é", "你", "1", "\u0301", "'s", "<mask>", "\0", "\r\n "]),
                rng.choice([1000, 50_000, 1_100_000]),
                rng.choice(["instruction", "output_en", "lang", "id", "output"]))
        rows[0][what[2]] = what[0] * what[1]
        text = dumped(rows, array)
    else:
        what = rng.choice(["folder", "nothing", "circle"])
    if how != "type":
        file.write_bytes(text)
    else:
        file.unlink(missing_ok=True)
        if what == "folder":
            file.mkdir()
        elif what == "circle":
            file.symlink_to(file)
    what = f"{len(files)} files, {'array' if array else 'lines'}, {how}: {what}"
    return [str(work / f) for f in files], what


def use_records(rng, work):
    paths, what = damage_records(rng, work)
    name, side = rng.choice(["demo", "ranks", "bpe"]), rng.choice(["target", "both", "english"])
    tokenizer = TOKENIZERS[name]
    yield f"{name}, {side}, {what}"
    records, counts = make_records(read_parallel(*paths), tokenizer, side, 400)
    assert counts.kept == len(records) == counts.read - counts.empty - counts.long
    for r in records:
        for ids in (r.prompt + r.answer, r.prompt + (r.query_en or []),
                    (r.prompt_en or []) + (r.answer_en or [])):
            assert len(ids) <= 400 and all(0 <= i < tokenizer.size for i in ids)
        assert 0 <= r.query[0] <= r.query[1] <= len(r.prompt)


# ------------------------------------------------------------------------------------------ tokenizers

TEXTS = ["", "Hello, world! It's 2024.", " the  other the\n\n", "Xin chào thế giới 你好 😀\0\x7f\u2028",
         "<s></s><mask>", "aaaa" * 50 + " " * 200]
MERGES = ["t h", "th e", "Ġ the", "h e", "l l", "o Ġ", "a a"]           # Ġ: a space, in GPT-2's table
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS = [chr(b) if b in plain else chr(256 + [c for c in range(256) if c not in plain].index(b))
         for b in range(256)]
PIECES = CHARS + [m.replace(" ", "") for m in MERGES]
BPE = dict(version="1.0", truncation=None, added_tokens=[dict(id=263, content="<end>", special=True)],
           normalizer=None, pre_tokenizer=dict(type="Sequence", pretokenizers=[
               dict(type="Digits", individual_digits=True),
               dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)]),
           post_processor=None, decoder=dict(type="ByteLevel"),
           model=dict(type="BPE", dropout=None, unk_token=None, byte_fallback=False, merges=MERGES,
                      vocab={piece: n for n, piece in enumerate(PIECES)}))
RANKS = b"".join(b"%s %d\n" % (base64.b64encode(piece), n) for n, piece in enumerate(
    [bytes([b]) for b in range(256)] + [m.replace(" ", "").replace("Ġ", " ").encode() for m in MERGES]))
VOCAB = dict(demo=3200, ranks=263, bpe=263)


def write_tokenizer(name, folder):
    """An undamaged tokenizer -> its Config."""
    os.makedirs(folder)
    whole = {"demo": (DEMO / "tokenizer.model").read_bytes(), "ranks": RANKS, "bpe": json.dumps(BPE).encode()}
    (folder / ("tokenizer.json" if name == "bpe" else "tokenizer.model")).write_bytes(whole[name])
    (folder / "config.json").write_text(json.dumps(dict(BASES["llama"], vocab_size=VOCAB[name])))
    return Config.read(str(folder))


def damage_tokenizer(rng, work):
    """A damaged tokenizer -> (its Config, what was done)."""
    name, folder = rng.choice(["demo", "ranks", "bpe", "bpe"]), work / "case"
    config = write_tokenizer(name, folder)
    file = folder / ("tokenizer.json" if name == "bpe" else "tokenizer.model")
    blob = file.read_bytes()
    how = rng.choice(["file", "ids"] + ["bytes", "part"] * 8)
    if how == "file":
        what = rng.choice(["folder", "circle", "pickle"])
        file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "circle":
            file.symlink_to(file)
        else:
            file.write_bytes(pickle.dumps(Bomb(str(work / MARKER))))
        return config, f"{name}, {how}: {what}"
    if how == "ids":
        what = (rng.choice(["bos_token_id", "eos_token_id"]),
                rng.choice([-1, 2 ** 31, config.vocab_size, 0, [], [-5]]))
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, what[0]: what[1]}))
        return str(folder), f"{name}, {how}: {what}"
    if how == "bytes":
        blob, what = damaged_bytes(rng, blob)
    elif name == "bpe":
        blob, what = damaged_json(rng, BPE)
    elif name == "ranks":
        lines, n = blob.split(b"\n")[:-1], rng.randrange(263)
        what = rng.choice(["swap", "rank", "piece", "lose", "double", "shuffle"])
        piece, rank = lines[n].split()
        if what == "swap":
            lines[n], lines[0] = lines[0].split()[0] + b" " + rank, piece + b" 0"
        elif what == "rank":
            lines[n] = piece + b" " + rng.choice([b"-1", b"1e3", b"9" * 10_000, b"0", b"", b"263", b"1_0",
                                                  b"\xb2"])
        elif what == "piece":
            lines[n] = rng.choice([b"", b"=", b"QQ", b"QUE=" * 50, b"\xff", b"QUJD"]) + b" " + rank
        elif what == "lose":
            del lines[n]
        elif what == "double":
            lines.insert(n, lines[n])
        else:
            rng.shuffle(lines)
        blob = b"\n".join(lines) + b"\n"
    else:                                                   # the protobuf's structure, kept whole
        what = rng.choice(["score", "type", "piece", "model", "settings"])
        pieces = list(re.finditer(rb"\n[\x09-\x30]\n([\x01-\x20])", blob[:45_000]))
        at = rng.choice(pieces)
        a, length = at.end(), at.group(1)[0]
        blob = bytearray(blob)
        if what == "score":
            score = rng.choice([math.nan, math.inf, -math.inf, 1e38])
            blob[a + length + 1:a + length + 5] = struct.pack("<f", score)
        elif what == "type":
            blob[8 + rng.choice([0, 14, 29]) + 5] = rng.randrange(8)
        elif what == "piece":
            blob[a:a + length] = rng.choice([rng.randbytes(length), b"\0" * length, b"e" * length])
        elif what == "model":                               # unigram, BPE, word, character, or none of them
            place = blob.rindex(b"\x12+\x18\x02")
            blob[place + 3] = rng.choice([0, 1, 3, 4, 9])
        else:
            blob[rng.randrange(blob.rindex(b"\x12+\x18\x02"), len(blob))] = rng.randrange(256)
        blob = bytes(blob)
    file.write_bytes(blob)
    return config, f"{name}, {how}: {what}"


def use_tokenizer(rng, work):
    config, what = damage_tokenizer(rng, work)
    yield what
    config = Config.read(config) if isinstance(config, str) else config
    try:
        tokenizer = Tokenizer(config)
    except InputError as error:                             # go on, with a vocabulary of the size it has
        size = re.search(r"the tokenizer has (\d+) ids", str(error))
        if not size or not 2 < int(size.group(1)) < 2 ** 20:
            raise
        tokenizer = Tokenizer(dataclasses.replace(config, vocab_size=int(size.group(1))))
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS)):
        assert all(0 <= i < tokenizer.size for i in ids)
        back = tokenizer.decode(ids)
        assert back == text or tokenizer.sp or min(tokenizer.ids) < 0, f"{text!r} became {back!r}"
        back.encode("utf-8")
    for ids in ([], [0, 1, 2, 5, tokenizer.size - 1, tokenizer.size, 2 ** 31], list(range(tokenizer.size))):
        tokenizer.decode(ids).encode("utf-8")


# ------------------------------------------------------------------------------------------ checkpoints

RANKS_1 = train.Ranks(torch.device("cpu"))
RUN = dict(lc_layer="auto", et_layer="auto", lr=0.1, method="tft")


def training(folder, out):
    """What load_checkpoint fills, and the settings it is reached by."""
    a = argparse.Namespace(out=str(out), lr=0.1, weight_decay=0.0, keep=2, save_async="no", resume="auto",
                           model="m", method="tft")
    model = DFT(load(str(folder)), Method("none", "none"))
    return a, model, train.make_optimizer(model, a)


def write_run(folder, base):
    """A run with checkpoints after steps 1 and 2, whose weights are 1 and 2 everywhere."""
    a, model, optimizer = training(base, folder)
    os.makedirs(folder)
    (folder / "settings.json").write_text(json.dumps(RUN))
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        with contextlib.redirect_stdout(sys.stderr):        # stdout has a line a case
            train.save_checkpoint(a, model, optimizer, train.Progress(step, step), RUN, RANKS_1)


def damage_run(rng, work):
    """A damaged copy of a run -> (its folder, the steps that may be loaded, what was done)."""
    out = work / "case"
    shutil.copytree(work / "bases" / "run", out)
    folder = out / "checkpoints" / f"step-00000{rng.choice([1, 2, 2, 2])}"
    if rng.random() < 0.5:                                  # no other to fall back on
        shutil.rmtree(folder.parent / f"step-00000{3 - int(folder.name[-1])}")
    state, shards = folder / "state.json", sorted(folder.glob("*.safetensors"))
    shard = rng.choice(shards)
    how = rng.choice(["shard", "shard", "state", "state text", "settings", "signed shard", "signed shard",
                      "signed header", "signed header", "signed state", "signed state", "type", "pickle",
                      "name"])
    if how == "settings":
        text, what = rng.choice([damaged_json, lambda rng, v: damaged_bytes(rng, json.dumps(v).encode())])(
            rng, RUN)
        (out / "settings.json").write_bytes(text)
    elif how in ("shard", "signed shard"):
        text, what = damaged_bytes(rng, shard.read_bytes())
        shard.write_bytes(text)
    elif how == "signed header":
        blob = shard.read_bytes()
        (size,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8:8 + size])
        own = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        if rng.random() < 0.5:                              # where in the whole each tensor says to lie
            text, what = damaged_json(rng, own)
            header["__metadata__"]["DCP_SHARDING_INFO"] = text.decode()
            text = json.dumps(header).encode()
        else:
            text, what = damaged_json(rng, header)
        shard.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + size:])
    elif how in ("state", "state text"):
        text, what = (damaged_json(rng, json.loads(state.read_text())) if how == "state" else
                      damaged_bytes(rng, state.read_bytes()))
        state.write_bytes(text)
    elif how == "signed state":
        value = json.loads(state.read_text())
        del value["digest"]
        text, what = damaged_json(rng, value)
        state.write_bytes(text)
    elif how == "type":
        what = (rng.choice([state, shard, folder, folder.parent]),
                rng.choice(["folder", "file", "nothing", "circle"]))
        if what[0].is_dir():
            shutil.rmtree(what[0])
        else:
            what[0].unlink()
        if what[1] == "folder":
            what[0].mkdir()
        elif what[1] == "file":
            what[0].write_text("x")
        elif what[1] == "circle":
            what[0].symlink_to(what[0])
        what = what[0].name, what[1]
    elif how == "pickle":
        what = rng.choice([".metadata", "state.json", shard.name, "__0_0.distcp", "optimizer.pt"])
        (folder / what).write_bytes(pickle.dumps(Bomb(str(work / MARKER))))
    else:
        what = rng.choice(["step-000003", "step-3", "step-999999999", "step-00000x", "step-000002.partial",
                           "a\nb", "step-000002.damaged", "x" * 200])
        if not (folder.parent / what).exists():
            os.rename(folder, folder.parent / what)
    signed = how.startswith("signed")
    if signed:                                              # as a liar would: every digest is right
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            value = json.loads(state.read_text())
            value.pop("digest", None)
            if how != "signed state":
                value["files"] = {f.name: train.digest(str(f)) for f in shards}
            state.write_text(json.dumps({**value, "digest": train.digest(value)}))
    return out, signed, f"{folder.name[-1]}, {how}: {what}"


def use_run(rng, work):
    out, signed, what = damage_run(rng, work)
    yield what
    a, model, optimizer = training(work / "bases" / "llama", out)
    SAID.clear()
    train.claim(a, RUN)
    run = train.load_checkpoint(a.out, model, optimizer, RANKS_1, lambda text: SAID.append(text))
    assert all(len(text) < 1500 and text.isprintable() for text in SAID), SAID
    if not signed and run.step:     # nothing between: all of one step's weights, and AdamW's count with them
        assert all((p == run.step).all() for p in model.parameters()) and run.step in (1, 2)
        assert all(optimizer.state[p]["step"] == run.step for p in model.parameters())


# ------------------------------------------------------------------------------------------ running the cases

SAID = []

TOKENIZERS = {}                                             # undamaged
KINDS = {"models": use_model, "records": use_records, "tokenizers": use_tokenizer, "checkpoints": use_run}


def run_case(kind, seed, work):
    """(what was done, "loaded" or "refused", the message) of a case; an exception is a failure."""
    for path in work.iterdir():
        if path.name != "bases":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    rng = random.Random(f"{kind} {seed}")
    case = KINDS[kind](rng, work)
    what, outcome, message = next(case), "loaded", ""
    print(f"{kind} {seed}: {what}"[:300].encode("unicode_escape").decode(), end="\t", flush=True)
    try:
        next(case, None)
    except InputError as error:
        outcome, message = "refused", str(error)
        assert len(message) < 1500 and message.isprintable(), f"message of {len(message)}: {message!r}"
    assert not (work / MARKER).exists(), "code of a file was run"
    return outcome, message


def peak():
    """MiB that this process held at most, so far."""
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_cases(kind, work, first, last, place):
    """Cases first..last-1, a line each; place, which is shared memory, says how far they are."""
    if sys.platform == "linux":         # memory not yet touched is not resident: bound what is reserved, too
        with open("/proc/self/statm") as file:
            reserved = int(file.read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (reserved + 2 * 2 ** 30, resource.RLIM_INFINITY))
    for name in VOCAB:
        TOKENIZERS[name] = Tokenizer(write_tokenizer(name, work / f"{name}-whole"))
    if kind == "models":
        load(str(DEMO))                                     # what torch takes once is no case's
    for seed in range(first, last):
        place[:8] = struct.pack("<Q", seed)
        before = peak()
        signal.alarm(SECONDS)                               # ends the process, native code or not
        try:
            outcome, message = run_case(kind, seed, work)
            assert peak() - before < MIB, f"{peak() - before:.0f} MiB more"
        except BaseException as error:                      # a Rust panic is no Exception
            outcome, message = "FAILED", f"{type(error).__name__} {error}"
            traceback.print_exc()
        print(f"{outcome}\t{message[:300]!r}", flush=True)
    signal.alarm(0)


def main():
    """Fork for the cases, and again behind each that ends the process. The ru_maxrss of a program begins at
    the peak of the one that started it, but not that of a fork."""
    kind, folder, seeds = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(":")
    first, last, crashes, place = int(seeds[0]), int(seeds[-1]) + (len(seeds) == 1), 0, mmap.mmap(-1, 8)
    write_bases(folder / "bases")
    while first < last and crashes < 20:
        child = os.fork()
        if not child:
            run_cases(kind, folder, first, last, place)
            sys.stdout.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (seed,) = struct.unpack("<Q", place[:8])
        first = seed + 1
        if status:
            crashes += 1
            print(f"FAILED\tended by signal {-status}", flush=True)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_loads_or_is_refused_in_one_line(kind, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "RUST_BACKTRACE": "0"}
    out = subprocess.run([sys.executable, __file__, kind, str(tmp_path), f"0:{CASES}"], capture_output=True,
                         text=True, env=env)
    lines = [line.split("\t") for line in out.stdout.splitlines()]
    bad = ["\t".join(line) for line in lines if line[1] == "FAILED"]
    table = collections.Counter((re.search(r", ([a-z ]+):", line[0])[1], line[1]) for line in lines)
    print(*(f"\n{kind:12}{how:14}{outcome:10}{n:6}" for (how, outcome), n in sorted(table.items())))
    assert not bad and not out.returncode, "\n".join(
        [f"{len(bad)} of {CASES} cases failed", *bad[:20], out.stderr[-3000:]])
    assert len(lines) == CASES
    outcomes = collections.Counter(line[1] for line in lines)
    assert min(outcomes["loaded"], outcomes["refused"]) > CASES / 10, outcomes      # else it is no damage


# Rare among the cases above, so each once more.

@pytest.mark.parametrize("keys", [dict(hidden_size=2 ** 19, vocab_size=2 ** 19), dict(hidden_size=2 ** 30),
                                  dict(num_hidden_layers=2 ** 24)])
def test_a_huge_model_is_refused_before_it_is_allocated(tmp_path, keys):
    write_bases(tmp_path)
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**BASES["llama"], **keys}))
    before = peak()
    with pytest.raises(InputError):
        load(str(tmp_path / "llama"))
    assert peak() - before < MIB


@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_run_of_spaces_that_makes_tiktoken_panic_is_refused(tmp_path, space):
    tokenizer = Tokenizer(write_tokenizer("bpe", tmp_path / "bpe"))
    with pytest.raises(InputError, match="'output' holds a run of more than 400,000 spaces"):
        make_records([("row", record(0) | dict(output=f"a{space * 1_100_000}b"))], tokenizer, "target", 400)


def test_an_infinite_id_in_a_tokenizer_json_is_refused(tmp_path):
    config = write_tokenizer("bpe", tmp_path / "bpe")
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(BPE).replace('"the": 257', '"the": 1e999'))
    with pytest.raises(InputError, match="tokenizer.json: .*OverflowError"):
        Tokenizer(config)


if __name__ == "__main__":
    main()
