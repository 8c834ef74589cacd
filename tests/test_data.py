"""data.py: tokenizers against those of transformers, records against the template, batches."""
import dataclasses
import hashlib
import json
import re
import shutil
from array import array

import jinja2
import numpy as np
import pytest
import sentencepiece
from conftest import ROOT
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from data import (Record, Tokenizer, batch_of, chat_template, fingerprint, make_records,
                  micro_batches, prompt_text, read_parallel, read_rows, steps_per_epoch)
from model import Config, InputError

DEMO = ROOT / "demo" / "model"

# ------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "a", "Hello, world!", " leading", "  two leading", "trailing ",
    "trailing  ", " both ", "a  b   c    d", "a\n b\n  c\n\n\nd", "\t tab\tand\ttab",
    "carriage\r\nreturn\r", "line\u2028separator\u2029here", "\0 \x04\x06 control \x7f",
    "Don't I'LL we've they're it's O'Neill 'tis", "0 1 23 456 7890 12345678", "1 2  3   4",
    "1,234.56 + 7 = x2y3", "你好，世界！用 Python 写一个函数，计算 123 的平方。", "全角１２３　空格",
    "Xin chào thế giới, tiếng Việt có dấu.", "Decomposed: tie\u0302\u0301ng Vie\u0323\u0302t",
    "ما هي عاصمة مصر؟ ١٢٣ ٪", "مَرْحَبًا", "family 👩‍👩‍👧‍👦 flag 🇻🇳 tone 👍🏽", "rare 𠮷 𝔘 ꙮ",
    "non\u00a0breaking \u200bzero width", "½ Ⅳ ² ①", "naïve café Привет κόσμε",
    "def f(x):\n    return x ** 2  # comment\n\n\tif x: pass\n", "[link](http://a.b/c?d=e&f#g)",
    "<table><tr><td>1</td></tr></table>", "~~~ !!! ... --- ((())) {}[] ''\"\" ``` \\n",
    "### Instruction:\nTranslate.\n\n### Response:",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<2mass>", "[@BOS@]",
           "<start_of_turn>", "<end_of_turn>", "<unused3>", "<unused99>", "<|begin_of_text|>",
           "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "[INST]"]
# <s> and </s> are HTML to Gemma, and have ids as such
GEMMA_CONTROL = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|(start|end)_of_turn|unused\d+)>|\[@BOS@\]")


def write_folder(folder, file=None, **keys):
    """The Config of a folder with the demo's config.json, changed by keys, and a tokenizer file."""
    if file is not None:
        shutil.copy(file, folder)
    base = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**base, **keys}))
    return Config.read(str(folder))


def published_llama(file):
    """The tokenizer.json that is published with LLaMA-2, from its tokenizer.model: merges in the
    order of their scores, a prefix space even before a space. transformers 5's own conversion gives
    other ids for "a  b" and " leading"."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    scores = {piece: sp.get_score(i) for piece, i in vocab.items() if not sp.is_byte(i)}
    merges = generate_merges(vocab, scores)
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True,
                                    unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    fast.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture(scope="session", params=["demo", "llama2", "gemma2", "llama3", "smollm2"])
def pair(request, tmp_path_factory):
    """(our tokenizer, transformers' for the same files, ids that no plain text may have)."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if name == "demo":
        theirs = published_llama(DEMO / "tokenizer.model")
        return Tokenizer(Config.read(str(DEMO))), theirs, {0, 1, 2}
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
        theirs = AutoTokenizer.from_pretrained(folder)
        return Tokenizer(Config.read(folder)), theirs, set(theirs.added_tokens_decoder)
    shared = request.getfixturevalue("shared")
    file = shared / "data" / "tokenizers" / name / "tokenizer.model"
    if name == "llama2":
        config = write_folder(folder, file, vocab_size=32000)
        return Tokenizer(config), published_llama(file), {0, 1, 2}
    if name == "gemma2":    # as published: tokenizer.model, and tokenizer.json with all its tokens
        config = write_folder(folder, file, vocab_size=256000, bos_token_id=2, eos_token_id=1)
        theirs = GemmaTokenizer.from_pretrained(folder)
        theirs.save_pretrained(folder)
        control = {i for piece, i in theirs.get_vocab().items() if GEMMA_CONTROL.fullmatch(piece)}
        return Tokenizer(config), theirs, control
    fast = TikTokenConverter(vocab_file=str(file)).converted()
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast)
    theirs.save_pretrained(folder)                  # published folders have a tokenizer.json
    config = write_folder(folder, vocab_size=128256, bos_token_id=128000, eos_token_id=128001)
    return Tokenizer(config), theirs, set(range(128000, 128256))


def test_ids_equal_those_of_transformers_and_decode_to_the_text(pair):
    ours, theirs, _ = pair
    expected = theirs(TEXTS, add_special_tokens=False).input_ids
    for text, found, wanted in zip(TEXTS, ours.encode(TEXTS), expected):
        assert found == wanted, repr(text)
        lacking = theirs.decode(wanted) != text and "\x04" in text      # SmolLM2 has no such byte
        assert lacking or ours.decode(found) == text
    (ids,) = ours.encode(["Hello, world!"])
    padded = [ours.bos_id, *ids, ours.eos_id, ours.size, ours.size + 5]
    assert ours.decode(padded) == "Hello, world!"           # no control tokens, no other ids


def test_the_text_of_a_special_token_is_plain_text(pair):
    ours, _, control = pair
    texts = SPECIAL + [f"say {s} twice: {s}{s}" for s in SPECIAL] + ["".join(SPECIAL)]
    for text, ids in zip(texts, ours.encode(texts)):
        assert not control & set(ids), text
        assert ours.decode(ids) == text


BOS = {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
NO_BOS = {"single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]}


@pytest.mark.parametrize("post, settings, bos", [
    (BOS, {"add_bos_token": False}, [1]), ({"processors": [{"type": "ByteLevel"}, BOS]}, {}, [1]),
    (NO_BOS, {"add_bos_token": True}, []), (None, {"add_bos_token": True}, []),
    ("no file", {"add_bos_token": True}, [1]), ("no file", {"add_bos_token": False}, []),
    ("no file", {}, [1])])
def test_bos_is_added_as_transformers_5_adds_it(tmp_path, post, settings, bos):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if post != "no file":
        (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": post}))
    assert Tokenizer(write_folder(tmp_path, DEMO / "tokenizer.model")).bos == bos


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_a_prompt_is_what_transformers_chat_template_gives(request, tmp_path, name):
    if name == "demo":      # without "legacy", transformers 5 has no space before the first word
        write_folder(folder := tmp_path, DEMO / "tokenizer.model")
        settings = json.loads((DEMO / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    else:
        folder = request.getfixturevalue("smollm2")
    ours, theirs = Tokenizer(Config.read(str(folder))), AutoTokenizer.from_pretrained(folder)
    assert ours.bos == theirs("x").input_ids[:-1][:1]
    theirs.chat_template = chat_template(bool(ours.bos))
    for question in ("What is this?", "你好吗\n第二行 ", "{{ 1 }} \\n <b> {% x %}", " lead"):
        messages = [{"role": "user", "content": question}]
        row = dict(instruction=question, output="!")
        (record,), _ = make_records([("row", row)], ours, "target", 512)
        text = (theirs.bos_token if ours.bos else "") + prompt_text(question, "")
        assert theirs.apply_chat_template(messages, tokenize=False) == text
        assert theirs.apply_chat_template(messages, return_dict=False) == list(record.prompt)
    for roles in (["system", "user"], ["user", "assistant", "user"], ["assistant"]):
        messages = [{"role": role, "content": "text"} for role in roles]
        with pytest.raises(jinja2.exceptions.TemplateError, match="pass exactly one user message"):
            theirs.apply_chat_template(messages)


@pytest.mark.parametrize("name", ["demo", "llama2", "gemma2", "smollm2"])
def test_added_tokens_and_a_folder_without_tokenizer_model_give_the_ids_of_transformers(
        request, tmp_path, name):
    """Folders as transformers 5 saves them: all ids are in tokenizer.json. A token that somebody
    added is found wherever it is in a text; the model has a row for each."""
    if name == "smollm2":
        theirs = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    elif name == "demo":
        theirs = AutoTokenizer.from_pretrained(DEMO)
    else:
        shared = request.getfixturevalue("shared")
        shutil.copy(shared / "data" / "tokenizers" / name / "tokenizer.model", tmp_path)
        kind = GemmaTokenizer if name == "gemma2" else LlamaTokenizer
        theirs = kind.from_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").unlink()
    for added in ([], ["Bác", "法国", "<think>", *(f"<new{n}>" for n in range(2000))]):
        theirs.add_tokens(added)
        theirs.save_pretrained(tmp_path)
        ours = Tokenizer(write_folder(tmp_path, vocab_size=len(theirs), eos_token_id=2))
        texts = [*TEXTS, "Bác Hồ ở 法国。<think>a b</think>", "xBácx <new7><new1999>", "<new77"]
        expected = theirs(texts, add_special_tokens=False).input_ids
        for text, found, wanted in zip(texts, ours.encode(texts), expected):
            assert found == wanted, repr(text)
        assert not added or theirs.convert_tokens_to_ids("Bác") in ours.encode(texts)[-3]


TOKEN = {"content": "<x>", "special": False}
ADDED = {"tokenizer_config.json": {"added_tokens_decoder": {"3200": TOKEN}},
         "added_tokens.json": {"<x>": 3200}}


@pytest.mark.parametrize("name", ADDED)
def test_an_added_token_without_a_tokenizer_json_is_refused_unless_it_is_special(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(ADDED[name]))
    config = write_folder(tmp_path, DEMO / "tokenizer.model", vocab_size=3201)
    with pytest.raises(InputError, match="1 tokens were added to the tokenizer, such as '<x>'"):
        Tokenizer(config)
    text = json.dumps(ADDED[name]).replace('"special": false', '"special": true')
    (tmp_path / name).write_text(text)
    special = {"additional_special_tokens": ["<x>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert Tokenizer(Config.read(str(tmp_path))).size == 3200


@pytest.mark.parametrize("end, ids, taught", [
    ("</s>", [3, 2], 2), ("</s>", 3, 3), (None, [3, 2], 3)])
def test_the_end_token_is_the_tokenizers_own_if_the_model_ends_with_it(tmp_path, end, ids, taught):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    config = write_folder(tmp_path, DEMO / "tokenizer.model", eos_token_id=ids)
    assert Tokenizer(config).eos_id == taught


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", '{"added_tokens": 7}'),
    ("tokenizer.json", '{"post_processor": {"processors": 3}}'),
    ("tokenizer.json", '{"post_processor": {"single": [1]}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}')])
def test_settings_of_a_tokenizer_that_are_malformed_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="tokenizer.json or tokenizer_config.json is malformed"):
        Tokenizer(write_folder(tmp_path, DEMO / "tokenizer.model"))


@pytest.mark.parametrize("size, fits", [(3199, False), (3200, True), (4224, True), (4225, False)])
def test_a_model_has_as_many_ids_as_its_tokenizer_or_a_few_more(tmp_path, size, fits):
    config = write_folder(tmp_path, DEMO / "tokenizer.model", vocab_size=size)
    if fits:
        assert Tokenizer(config).size == 3200
    else:
        with pytest.raises(InputError, match=f"3200 ids, but vocab_size in config.json is {size}"):
            Tokenizer(config)


# ---------------------------------------------------------------------------------------- records

@pytest.fixture(scope="module")
def demo():
    return Tokenizer(Config.read(str(DEMO)))


ENGLISH = ("instruction_en", "input_en", "output_en")


def example(n=0, **keys):
    """A parallel row; every third has an input."""
    return {"instruction": f"Thủ đô {n} là gì?", "input": f"Nước {n}" * (n % 3 == 0),
            "output": f"Hà Nội {n}", "instruction_en": f"What is capital {n}?",
            "input_en": f"Country {n}" * (n % 3 == 0), "output_en": f"Hanoi {n}",
            "lang": "vi", **keys}


def plain(n=0, **keys):
    return {"instruction": f"Name prime {n}.", "input": None, "output": f"Prime {n}", **keys}


def without(row, *keys):
    return {k: v for k, v in row.items() if k not in keys}


def english_of(row):
    return {key.removesuffix("_en"): row[key] for key in ENGLISH}


def write(path, rows):
    """Rows as JSONL -> the path as text."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def records_of(rows, tokenizer, side="both", max_length=512, english_prompt=True):
    """make_records of plain objects; the ids are lists, which are easier to compare."""
    rows = [(f"row {n}", row) for n, row in enumerate(rows)]
    records, counts = make_records(rows, tokenizer, side, max_length, english_prompt)
    for record in records:
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            setattr(record, field.name, list(value) if isinstance(value, array) else value)
    return records, counts


@pytest.mark.parametrize("input, digest", [("", "cbaf5236ee205dbf"), ("I", "8f7586652fc6e2b8")])
def test_the_prompt_is_stanford_alpacas_to_the_letter(input, digest):
    """Digests of the texts in github.com/tatsu-lab/stanford_alpaca, train.py, for instruction Q."""
    assert hashlib.sha256(prompt_text("Q", input).encode()).hexdigest()[:16] == digest


def test_jsonl_and_a_json_array_are_read_alike(tmp_path):
    rows = [example(n, output=f"one\u2028two\u0085{n}") for n in range(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for text in ("\n".join(lines) + "\n", "\n".join(lines), "\r\n".join(lines) + "\r\n",
                 "\n\n  \n".join(lines) + "\n\n", "\n " + json.dumps(rows, indent=1)):
        for mark in ("", "\ufeff"):
            (tmp_path / "rows").write_bytes((mark + text).encode("utf-8"))
            assert [row for _, row in read_rows(str(tmp_path / "rows"))] == rows


def test_two_files_are_joined_by_id_whatever_their_order_and_the_type_of_ids(tmp_path):
    both = [example(n, id=n) for n in range(6)]
    english = [{**english_of(row), "id": str(row["id"])} for row in both]
    english.append({**english[0], "id": "of no target row"})
    shuffled = [english[n] for n in (4, 0, 6, 2, 5, 1, 3)]
    target = [without(row, *ENGLISH) for row in both]
    joined = read_parallel(write(tmp_path / "vi", target), write(tmp_path / "en", shuffled))
    how = "by id, 1 English rows not used"
    assert [row for _, row in joined] == [{**row, "joined": how} for row in both]


def test_two_files_without_ids_are_joined_by_position_and_the_counts_say_so(tmp_path, demo):
    both = [example(0, output_en=""), example(1), example(2)]
    english = [english_of(row) for row in both]
    english[0]["output"] = english[1]["id"] = None          # as pandas writes what is missing
    target = [without(row, *ENGLISH) for row in both]
    joined = read_parallel(write(tmp_path / "vi", target), write(tmp_path / "en", english))
    assert [row for _, row in joined] == [{**row, "joined": "by position"} for row in both]
    _, counts = make_records(joined, demo, "both", 512)
    assert str(counts) == ("3 of 3 records kept; 1 without a whole English side; "
                           "3 joined by position; 2 with an English side")


BAD_PAIRS = {
    "different lengths": ([plain(0), plain(1)], [plain(0)], r"vi:1: no id; .*vi \(2\) .*en \(1\)"),
    "ids in one file": ([plain(0, id=0)], [plain(0)], "en:1: no id; expected ids in all rows"),
    "a hole": ([plain(id=0), plain(id=1)], [plain(id=0), plain()], "en:2: no id; expected ids"),
    "two holes": ([plain(id=0), plain()], [plain(id=0), plain()], "vi:2: no id; expected ids"),
    "an id twice": ([plain(id=1)], [plain(id=1), plain(id="1")], "en:2: id '1' occurs twice.*en:1"),
    "an unknown id": ([plain(id="x")], [plain(id=1)], r"vi:1: no row of .*en has its id, 'x'"),
    "a fraction": ([plain(id=0)], [plain(id=0.0)], "en:1: id 0.0: expected a whole number or"),
    "a truth value": ([plain(id=True)], [plain(id=True)], "vi:1: id True: expected a whole number"),
    "English on both": ([example(1)], [plain(0)], "vi:1: has an English side of its own"),
    "a number as text": ([plain()], [plain(output=7)], "en:1: 'output' is 7, expected text")}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_two_files_that_do_not_belong_together_are_refused(tmp_path, case):
    target, english, message = BAD_PAIRS[case]
    with pytest.raises(InputError, match=message):
        read_parallel(write(tmp_path / "vi", target), write(tmp_path / "en", english))


def test_a_record_is_bos_prompt_answer_eos_with_its_parts_tokenised_separately(demo):
    for row in (example(0), example(1)):                    # with an input and without
        (record,), counts = records_of([row], demo)
        texts = [prompt_text(row["instruction"], row["input"]), row["output"], row["output_en"],
                 prompt_text(row["instruction_en"], row["input_en"]),
                 row["instruction_en"] + ("\n\n" + row["input_en"] if row["input_en"] else "")]
        prompt, answer, answer_en, prompt_en, query_en = demo.encode(texts)
        eos = [demo.eos_id]
        assert (record.prompt, record.answer) == (demo.bos + prompt, answer + eos)
        assert (record.prompt_en, record.answer_en) == (demo.bos + prompt_en, answer_en + eos)
        assert record.query_en == query_en                  # no template, no BOS, no EOS
        assert str(counts) == "1 of 1 records kept; 1 with an English side"
        target = Record(record.prompt, record.answer, record.query)
        assert records_of([row], demo, "target")[0] == [target]
        english = Record(record.prompt_en, record.answer_en, record.prompt_en_query)
        assert records_of([row], demo, "english")[0] == [english]


UNTRANSLATED = {"missing": without(example(1), *ENGLISH)}
for value in (None, "", " "):
    UNTRANSLATED[str(value)] = example(1, **dict.fromkeys(ENGLISH, value))
HALF = {"no answer": example(1, output_en=""), "a null answer": example(1, output_en=None),
        "no query": example(1, instruction_en=" ")}


@pytest.mark.parametrize("lang", ["vi", "en", None])
@pytest.mark.parametrize("case", [*UNTRANSLATED, *HALF])
def test_a_row_without_a_whole_english_side_is_trained_without_it_and_counted(demo, case, lang):
    rows = [example(0), {**UNTRANSLATED, **HALF}[case] | {"lang": lang}, example(2)]
    records, counts = records_of(rows, demo)
    assert [r.query_en is None for r in records] == [False, True, False]
    assert records[1] == records_of(rows[1:2], demo, "target")[0][0]
    assert (counts["kept"], counts["with an English side"]) == (3, 2)
    assert counts["without a whole English side"] == 1
    assert records[2] == records_of([example(2)], demo)[0][0]


def test_the_method_sft_trains_on_english_and_on_nothing_else(demo):
    english = [plain(1, lang=None), plain(2, lang="en"), plain(3, lang="vi")]
    assert records_of(english[:1], demo, "english")[1]["kept"] == 1     # Stanford Alpaca's own file
    assert records_of(english, demo, "english")[1]["kept"] == 2
    rows = [example(0), *UNTRANSLATED.values(), without(example(2), "lang", *ENGLISH), english[1]]
    records, counts = records_of(rows, demo, "english")
    assert str(counts) == ("2 of 7 records kept; "
                           "5 dropped: a query or answer is missing")
    assert demo.decode(records[1].answer) == "Prime 2"


@pytest.mark.parametrize("keys", [{"output": ""}, {"output": " \n"}, {"instruction": " "}])
def test_a_row_without_a_query_or_an_answer_is_dropped_and_counted(demo, keys):
    records, counts = records_of([example(0), example(1, **keys), example(2)], demo)
    assert len(records) == 2
    assert str(counts) == ("2 of 3 records kept; 2 with an English side; "
                           "1 dropped: a query or answer is missing")
    with pytest.raises(InputError, match="row 0 .*0 of 1 records kept; 1 dropped: a query or"):
        records_of([example(1, **keys)], demo)


@pytest.mark.parametrize("key, field", [("instruction_en", "query_en"), ("output_en", "answer_en"),
                                        ("output", "answer")])
def test_every_sequence_of_a_record_fits_max_length(demo, key, field):
    # instruction_en lengthens the English prompt too: the target side must then have more room
    rows = [example(1, **{key: "many words " * 20})]
    (whole,), _ = records_of(rows, demo)
    length = max(len(whole.prompt), len(whole.prompt_en)) + 5
    (r,), counts = records_of(rows, demo, "both", length)
    for prompt, part in ((r.prompt, r.answer), (r.prompt, r.query_en), (r.prompt, r.answer_en),
                         (r.prompt_en, r.answer_en)):
        assert len(prompt + part) <= length
    part, all_of_it = getattr(r, field), getattr(whole, field)
    assert part and part == all_of_it[:len(part)] and len(part) < len(all_of_it)
    assert counts["cut at --max_length"] == 1


def test_a_row_whose_prompt_fills_max_length_is_dropped_if_the_method_uses_that_prompt(demo):
    long = "many words " * 40
    rows = [example(1), example(1, instruction=long), example(1, instruction_en=long)]
    prompt = len(records_of(rows[:1], demo)[0][0].prompt)
    for side, english_prompt, kept in (("both", True, 1), ("both", False, 2), ("target", True, 2)):
        records, counts = records_of(rows, demo, side, prompt + 30, english_prompt)
        assert (len(records), counts["kept"]) == (kept, kept)
        assert counts["dropped: prompt too long for --max_length"] == 3 - kept
        assert all((r.prompt_en is not None) == (kept == 1) for r in records)
    assert records_of(rows, demo, "target", prompt + 1)[1]["kept"] == 2    # room for one token
    with pytest.raises(InputError, match="3 dropped: prompt too long for --max_length"):
        records_of(rows, demo, "target", prompt)


@pytest.mark.parametrize("keys", [{}, {"input": "Câu: mèo đen"}, {"instruction": "你好吗"},
                                  {"instruction": "ما هي العاصمة؟", "input": "مصر"}])
def test_the_query_span_covers_the_query_with_no_token_to_spare(demo, keys):
    row = example(1, **keys)
    row |= {f"{key}_en": row[key] for key in ("instruction", "input", "output")}
    (record,), _ = records_of([row], demo)
    first, end = record.query
    query = row["instruction"] + (f"\n\n### Input:\n{row['input']}" if row["input"] else "")
    assert query in demo.decode(record.prompt[first:end])
    # Its first and last token may cross the border ("?\n\n###" is one token here)
    for shorter in (record.prompt[first + 1:end], record.prompt[first:end - 1]):
        assert query not in demo.decode(shorter)
    assert (record.prompt_en, record.prompt_en_query) == (record.prompt, record.query)


BAD_FILES = {
    "malformed line": (b'{"instruction": "a"}\n\n{"instruction": \n', "rows:3: malformed JSON"),
    "malformed array": (b'[{"instruction": "a"}, {]', "rows:1: malformed JSON"),
    "a list in a line": (b'{"instruction": "a"}\n["a"]\n', "rows:2: found a list, expected"),
    "text in an array": (b'[{"id": 1}, "b"]', r"rows\[1\]: found a str, expected an object"),
    "a key twice": (b'{"a": 1}\n{"b": 1, "c": 1, "b": 2}', "rows:2: .*'b' occurs twice"),
    "a key twice in an array": (b'[{"id": 1, "id": 2}]', "rows:1: .*'id' occurs twice"),
    "plain text": ("你好。\n".encode(), "rows:1: malformed.*expected JSONL or a JSON array"),
    "CSV": (b"instruction,output\na,b\n", "rows:1: malformed JSON.*expected JSONL or a JSON array"),
    "blank": (b"\xef\xbb\xbf \n\n", "rows: no records"), "empty array": (b"[]", "rows: no records"),
    "not UTF-8": ('{"instruction": "café"}'.encode("latin-1"), "rows: not UTF-8")}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_list_of_records_is_refused_with_its_place(tmp_path, case):
    blob, message = BAD_FILES[case]
    (tmp_path / "rows").write_bytes(blob)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / "rows"))
    with pytest.raises(InputError, match="nowhere.jsonl: No such file"):
        read_rows(str(tmp_path / "nowhere.jsonl"))


BAD_ROWS = {
    "no output": (without(example(1), "output"), "'output' is missing.*keys: ..instruction., "),
    "null": (example(1, output=None), "'output' is null, expected text"),
    "a number": (example(1, instruction=7), "'instruction' is 7, expected text"),
    "an English list": (example(1, input_en=["a"]), r"'input_en' is \[\"a\"\], expected text"),
    "half a surrogate pair": (example(1, output="a\ud800b"), "'output' is .*ud800.*expected text"),
    "a book": (example(1, output="a" * 1000001), "'output' has 1,000,001 characters; expected at"),
    "ShareGPT": ({"id": 1, "conversations": []}, "'instruction' is missing.*a chat: convert"),
    "messages": ({"messages": []}, "'instruction' is missing.*keys: ..messages.. .a chat: convert"),
    "a list as lang": (example(1, lang=["zh"]), r"'lang' is \[\"zh\"\], expected text"),
    "an escape code": (example(1, lang="\x1b[31m"), r"'lang' is '\\x1b\[31m', expected a language")}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_key(tmp_path, demo, case):
    row, message = BAD_ROWS[case]
    (tmp_path / "rows").write_text(json.dumps(example(0)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match="rows:2: " + message):
        make_records(read_parallel(str(tmp_path / "rows")), demo, "both", 512)


# ---------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("n, size", [(10, 3), (12, 4), (5, 8), (1, 1), (7, 7)])
def test_each_epoch_takes_every_record_exactly_once(n, size):
    steps = steps_per_epoch(n, size)
    for epoch in range(3):
        batches = [batch_of(epoch * steps + s, n, size, seed=3) for s in range(steps)]
        assert sorted(sum(batches, [])) == list(range(n))
        assert all(len(b) == size for b in batches[:-1]) and 0 < len(batches[-1]) <= size


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = [batch_of(epoch, 40, 40, seed) for epoch, seed in [*np.ndindex(3, 4), (0, -1)]]
    assert len(set(map(tuple, orders))) == len(orders) and list(range(40)) not in orders
    np.random.seed(7)
    assert batch_of(29, 40, 4, 2) == batch_of(2, 40, 40, 2)[-4:]


SIZES = {"ragged": [1, 90, 3, 40, 41, 42, 7, 7, 60, 100, 2], "no two fit": [60, 60, 60, 55],
         "oversize": [300, 5, 6, 7, 250], "one": [4], "none": []}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SIZES)
def test_micro_batches_hold_every_record_once_within_the_budget(name, ranks):
    sizes = SIZES[name]
    batches = micro_batches(sizes, 100, ranks)
    assert sorted(sum(batches, [])) == list(range(len(sizes)))
    assert len(batches) % ranks == 0 and len(batches) > 0
    for batch in batches:
        assert sum(sizes[n] for n in batch) <= 100 or len(batch) == 1


def test_micro_batches_are_few_and_equal_and_some_are_empty_with_few_records():
    assert len(micro_batches([10] * 12, 100, 1)) == 2
    assert len(micro_batches([10, 40, 50, 90], 100, 1)) == 2
    assert [len(batch) for batch in micro_batches([10] * 12, 100, 4)] == [3] * 4
    assert sorted(map(len, micro_batches([5, 5, 5], 100, 8))) == [0] * 5 + [1] * 3


def test_a_fingerprint_changes_with_every_id_its_position_and_its_field():
    a, b = Record([1, 2], [3], query_en=[4, 5]), Record([6], [7, 8])
    others = [[Record([1, 2], [3], query_en=[4, 9]), b], [b, a], [a], [b],
              [Record([1], [2, 3], query_en=[4, 5]), b], [Record([1, 2], [3], answer_en=[4, 5]), b],
              [Record([1, 2], [3], (0, 1), [4, 5]), b]]
    assert len({fingerprint(records) for records in ([a, b], *others)}) == 8
    assert fingerprint([a, b]) == fingerprint([Record([1, 2], [3], (0, 0), [4, 5]), b])


def test_a_csv_file_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(InputError, match="rows.csv: expected JSONL.*csv.DictReader"):
        read_rows(str(tmp_path / "rows.csv"))
