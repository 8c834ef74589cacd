"""Damaged files work, or end in an InputError of one line.

    python -m pytest tests/test_fuzz.py
    FUZZ_SEEDS=50 python -m pytest tests/test_fuzz.py       50 variants of each damage instead of 4

The damage is what users meet: an interrupted download, a full disk, line ends that a transfer
changed, an error page or a git-lfs pointer in the place of a file.
"""
import argparse
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import train
from data import KEYS, Tokenizer, make_records, read_parallel
from dft import DFT, Method
from model import Config, InputError, Packed, Transformer, generate, load, save

SEEDS = range(int(os.environ.get("FUZZ_SEEDS", 4)))
DEMO = ROOT / "demo" / "model"


# ----------------------------------------------------------------------------------------- damage

def other_file(rng, blob):
    return rng.choice([b"", b"\n", b"<!DOCTYPE html>\n<html><body>Access denied</body></html>\n",
                       b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1342\n",
                       b'{"error": "Repository not found"}', b"Entry not found",
                       "UTF-16\n".encode("utf-16"), b"PK\x03\x04" + rng.randbytes(500)])


def lose_a_block(rng, blob):
    at = rng.randrange(len(blob))
    return blob[:at] + blob[at + 100:]


DAMAGES = {
    "cut": lambda rng, blob: blob[:rng.randrange(len(blob))],
    "cut a little": lambda rng, blob: blob[:-rng.randint(1, 20)],
    "zeros at the end": lambda rng, blob: blob[:rng.randrange(len(blob))].ljust(len(blob), b"\0"),
    "a block lost": lose_a_block,
    "Windows line ends": lambda rng, blob: blob.replace(b"\n", b"\r\n"),
    "another file": other_file, "missing": None, "a folder": None}


def damage(rng, how, file):
    blob = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(DAMAGES[how](rng, blob))


def outcome(use, *args):
    """"works", or "refused" by an InputError of one line."""
    try:
        use(*args)
    except InputError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 1500, message
        return "refused"
    return "works"


# ------------------------------------------------------------- what is damaged, and how it is used

TINY = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2)
LLAMA = dict(TINY, model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=False)
GEMMA = dict(TINY, model_type="gemma2", query_pre_attn_scalar=4, sliding_window=3)


def use_model(folder):
    model = load(str(folder))
    c, packed = model.config, Packed()
    packed.add([0, 1, c.bos_token_id, *c.eos_ids], c.num_hidden_layers)
    x = model(packed, (c.num_hidden_layers,))[c.num_hidden_layers]
    assert model.logits(x).shape == (len(packed), c.vocab_size)
    (ids,) = generate(model, [[0, 1]], 2)
    assert all(0 <= i < c.vocab_size for i in ids)


def use_tokenizer(folder):
    tokenizer = Tokenizer(Config.read(str(folder)))
    for text in ("", "Hello, world!  the other", "Xin chào 你好 😀\n\n", "<s></s><mask>"):
        (ids,) = tokenizer.encode([text])
        assert all(0 <= i < tokenizer.size for i in ids)
        tokenizer.decode([*ids, tokenizer.size + 1])


def use_records(folder):
    tokenizer = Tokenizer(Config.read(str(DEMO)))
    files = [str(folder / file) for file in FILES[folder.name.split()[0]]]
    for side in ("target", "both", "english"):
        records, counts = make_records(read_parallel(*files), tokenizer, side, 200)
        assert counts["kept"] == len(records)
        dropped = sum(n for what, n in counts.items() if what.startswith("dropped"))
        assert counts["kept"] == counts["read"] - dropped
        for r in records:
            assert 0 <= r.query[0] <= r.query[1] <= len(r.prompt)
            assert max(len(r.prompt + r.answer), len(r.prompt) + len(r.query_en or ())) <= 200


def write_models(root):
    for name, raw in (("llama", LLAMA), ("gemma2", GEMMA)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(raw))
        model = Transformer(Config.read(str(root / name)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        save(model, str(root / name))


def write_tokenizers(root):
    for name in ("model", "json"):
        (root / name).mkdir()
        config = json.dumps(dict(LLAMA, vocab_size=3200), indent=1)
        (root / name / "config.json").write_text(config)
    shutil.copy(DEMO / "tokenizer.model", root / "model")
    shutil.copy(DEMO / "tokenizer_config.json", root / "model")
    fast = AutoTokenizer.from_pretrained(DEMO).backend_tokenizer
    fast.save(str(root / "json" / "tokenizer.json"))


FILES = {"lines": ["rows.jsonl"], "array": ["rows.txt"], "joined": ["1.jsonl", "2.jsonl"]}


def write_records(root):
    lines = (ROOT / "demo" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:4]
    rows = [json.loads(line) | {"id": n} for n, line in enumerate(lines)]
    english = [{key: row[f"{key}_en"] for key in KEYS} | {"id": row["id"]} for row in rows]
    for name in FILES:
        (root / name).mkdir()
    target = [{key: row[key] for key in (*KEYS, "id")} for row in rows]
    (root / "lines" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "joined" / "1.jsonl").write_text("\n".join(map(json.dumps, target)) + "\n")
    (root / "joined" / "2.jsonl").write_text("\n".join(map(json.dumps, english)) + "\n")
    (root / "array" / "rows.txt").write_text(json.dumps(rows, indent=1, ensure_ascii=False))


KINDS = {"models": (write_models, use_model), "tokenizers": (write_tokenizers, use_tokenizer),
         "records": (write_records, use_records)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: undamaged folders}."""
    out = {}
    for kind, (make, use) in KINDS.items():
        root = tmp_path_factory.mktemp(kind)
        make(root)
        out[kind] = sorted(root.iterdir())
        for folder in out[kind]:
            use(folder)
    return out


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_works_or_is_refused_in_one_line(folders, tmp_path, kind, how):
    rng, outcomes = random.Random(f"{kind} {how}"), []
    for folder in folders[kind]:
        for file in sorted(folder.iterdir()):
            for seed in SEEDS:
                copy = tmp_path / f"{folder.name} {file.name} {seed}"
                shutil.copytree(folder, copy)
                damage(rng, how, copy / file.name)
                outcomes.append(outcome(KINDS[kind][1], copy))
                shutil.rmtree(copy)
    assert "refused" in outcomes or how == "Windows line ends"


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_huge_model_is_refused_before_it_is_allocated(folders, tmp_path, key):
    shutil.copytree(folders["models"][1], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, key: 2 ** 40}))
    assert outcome(load, str(tmp_path / "model")) == "refused"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_code_in_a_model_folder_is_never_run(folders, tmp_path, name):
    shutil.copytree(folders["models"][1], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "marker"))))
    assert outcome(load, str(tmp_path / "model")) == "refused"
    assert not (tmp_path / "marker").exists()


# ------------------------------------------------------------------------------------ checkpoints

RANKS = train.Ranks(torch.device("cpu"))


def training(folder, out):
    """What save_checkpoint and load_checkpoint take."""
    settings = argparse.Namespace(out=str(out), keep=2, lr=0.1, weight_decay=0.0)
    model = DFT(load(str(folder)), Method("none", "none"))
    return settings, model, train.make_optimizer(model, settings)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run with checkpoints after steps 1 and 2, whose weights are 1 and 2 everywhere."""
    out = tmp_path_factory.mktemp("run")
    settings, model, optimizer = training(folders["models"][1], out)
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        train.save_checkpoint(settings, model, optimizer, step, RANKS)
    return out


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "a folder"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(folders, run, tmp_path, capsys, how):
    rng, steps = random.Random(how), set()
    for file in sorted((run / "checkpoints" / "step-000002").iterdir()):
        for seed in SEEDS:
            copy = tmp_path / f"{file.name} {seed}"
            shutil.copytree(run, copy)
            damage(rng, how, copy / "checkpoints" / "step-000002" / file.name)
            settings, model, optimizer = training(folders["models"][1], copy)
            train.load_checkpoint(settings, model, optimizer, RANKS)    # step 1 is whole: no error
            (step,) = {p.flatten()[0].item() for p in model.parameters()}
            assert all((p == step).all() for p in model.parameters())
            assert ("warning" in capsys.readouterr().out) == (step == 1)
            steps.add(step)
            shutil.rmtree(copy)
    assert 1 in steps or how == "Windows line ends"
