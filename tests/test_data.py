"""data.py: tokenizers against those of transformers, records against the template, batches by their promise.

    python -m pytest tests/test_data.py
"""
import json
import re
import shutil

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from data import (Record, Tokenizer, batch_of, fingerprint, make_records, micro_batches, read_parallel, read_rows,
                  steps_per_epoch)
from model import Config, InputError

DEMO = ROOT / "demo" / "model"


# ------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "a", "Hello, world!", " leading", "  two leading", "trailing ", "trailing  ",
    " both ", "a  b   c    d", "a\n b\n  c\n\n\nd", "\t tab\tand\ttab", "carriage\r\nreturn\r",
    "line\u2028separator\u2029here", "Don't I'LL we've they're it's O'Neill 'tis", "0 1 23 456 7890 12345678",
    "1,234.56 + 7 = x2y3", "v1.2.3-rc4", "1 2  3   4",
    "你好，世界！这是一个测试。", "用 Python 写一个函数，计算 123 的平方。", "全角１２３　空格", "繁體中文與注音ㄅㄆㄇ",
    "Xin chào thế giới, tiếng Việt có dấu.", "Hãy giải thích câu tục ngữ «có công mài sắt, có ngày nên kim».",
    "Decomposed: tie\u0302\u0301ng Vie\u0323\u0302t", "مرحبا بالعالم", "ما هي عاصمة مصر؟ ١٢٣ ٪", "مَرْحَبًا",
    "😀", "family 👩‍👩‍👧‍👦 flag 🇻🇳 tone 👍🏽", "rare 𠮷 𝔘 ꙮ", "non\u00a0breaking \u200bzero width", "½ Ⅳ ² ①",
    "def f(x):\n    return x ** 2  # comment\n\n\tif x: pass\n", "<table><tr><td>1</td></tr></table>",
    "[link](http://a.b/c?d=e&f#g)",
    "~~~ !!! ... --- ((())) {}[] ''\"\" ``` \\n", "ALLCAPS camelCase snake_case",
    "naïve café Übergröße ñandú Привет κόσμε",
    "### Instruction:\nTranslate.\n\n### Response:",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<2mass>", "<start_of_turn>",
           "<end_of_turn>", "<unused3>", "<unused99>", "[@BOS@]", "<|begin_of_text|>", "<|end_of_text|>",
           "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "[INST]"]
# <s> and </s> are HTML to Gemma, and have ids as such
GEMMA_CONTROL = re.compile(r"<(pad|eos|bos|unk|mask|2mass|(start|end)_of_turn|unused\d+)>|\[@BOS@\]")


def config_beside(tokenizer_file, folder, **keys):
    """A Config whose folder holds a copy of a tokenizer file."""
    shutil.copy(tokenizer_file, folder)
    base = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**base, **keys}))
    return Config.read(str(folder))


def published_llama(file):
    """The tokenizer.json that is published with LLaMA-2, rebuilt from its tokenizer.model: merges in the
    order of their scores, a prefix space even before a space. transformers 5's own conversion of a bare
    tokenizer.model orders merges by id and adds no second space, which gives other ids for "a  b" and
    " leading"."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    scores = {piece: sp.get_score(i) for piece, i in vocab.items() if not sp.is_byte(i)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=generate_merges(vocab, scores), fuse_unk=True,
                                    byte_fallback=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture(scope="session", params=["demo", "stories260K", "llama2", "gemma2", "llama3", "smollm2"])
def pair(request, tmp_path_factory):
    """(our tokenizer, transformers' for the same file, ids that no plain text may have)."""
    name = request.param
    if name == "demo":                              # shipped, so that this much is tested everywhere
        return Tokenizer(Config.read(str(DEMO))), published_llama(DEMO / "tokenizer.model"), {0, 1, 2}
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2")
        theirs = AutoTokenizer.from_pretrained(folder)
        control = set(theirs.all_special_ids) | set(theirs.added_tokens_decoder)
        return Tokenizer(Config.read(folder)), theirs, control
    shared = request.getfixturevalue("shared") / "data"
    if name == "stories260K":
        folder = shared / "checkpoints" / name      # its tokenizer.json is read by transformers alone
        return Tokenizer(Config.read(str(folder))), AutoTokenizer.from_pretrained(folder), {0, 1, 2}
    file, folder = shared / "tokenizers" / name / "tokenizer.model", tmp_path_factory.mktemp(name)
    if name == "llama2":
        return Tokenizer(config_beside(file, folder, vocab_size=32000)), published_llama(file), {0, 1, 2}
    if name == "gemma2":
        ours = Tokenizer(config_beside(file, folder, vocab_size=256000, bos_token_id=2, eos_token_id=1))
        theirs = GemmaTokenizer.from_pretrained(folder)
        return ours, theirs, {i for piece, i in theirs.get_vocab().items() if GEMMA_CONTROL.fullmatch(piece)}
    config = config_beside(file, folder, vocab_size=128256, bos_token_id=128000, eos_token_id=128001)
    theirs = PreTrainedTokenizerFast(tokenizer_object=TikTokenConverter(vocab_file=str(file)).converted())
    return Tokenizer(config), theirs, set(range(128000, 128256))


def test_ids_equal_those_of_transformers(pair):
    ours, theirs, _ = pair
    expected = theirs(TEXTS, add_special_tokens=False).input_ids
    for text, found, wanted in zip(TEXTS, ours.encode(TEXTS), expected):
        assert found == wanted, repr(text)


def test_decoding_gives_the_text_back(pair):
    ours, _, _ = pair
    for text, ids in zip(TEXTS, ours.encode(TEXTS)):
        assert ours.decode(ids) == text
    assert ours.decode([]) == ""


def test_the_text_of_a_special_token_is_plain_text(pair):
    ours, _, control = pair
    assert control
    texts = SPECIAL + [f"say {s} twice: {s}{s}" for s in SPECIAL] + ["".join(SPECIAL)]
    for text, ids in zip(texts, ours.encode(texts)):
        assert not control & set(ids), text
        assert ours.decode(ids) == text


def test_decode_leaves_out_bos_eos_and_ids_beyond_the_tokenizer(pair):
    ours, _, _ = pair
    (ids,) = ours.encode(["Hello, world!"])
    assert ours.decode([ours.bos_id, *ids, ours.eos_id, ours.size, ours.size + 5]) == "Hello, world!"


# ---------------------------------------------------------------------------------------------------- records

@pytest.fixture(scope="module")
def demo():
    """The tokenizer that is shipped."""
    return Tokenizer(Config.read(str(DEMO)))


def example(n=0, **keys):
    """A parallel record; every third has an input."""
    return {"instruction": f"Thủ đô {n} là gì?", "input": f"Nước {n}" * (n % 3 == 0), "output": f"Hà Nội {n}",
            "instruction_en": f"What is capital {n}?", "input_en": f"Country {n}" * (n % 3 == 0),
            "output_en": f"Hanoi {n}", "lang": "vi", **keys}


def english_only(n=0, **keys):
    """A record without parallel."""
    return {"instruction": f"Name prime {n}.", "input": "", "output": f"Prime {n}", **keys}


def write(path, rows):
    """Rows as JSONL -> the path as text."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ENGLISH = ("instruction_en", "input_en", "output_en")


def without(row, *keys):
    """A record less some of its keys."""
    return {k: v for k, v in row.items() if k not in keys}


def objects(rows):
    """Rows without their places."""
    return [row for _, row in rows]


def records_of(rows, tokenizer, side="both", max_length=512):
    """make_records of plain objects."""
    return make_records([(f"row {n}", row) for n, row in enumerate(rows)], tokenizer, side, max_length)


def alpaca(instruction, input):
    """Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca, train.py), written down once more."""
    if input:
        return ("Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
    return ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:")


def test_jsonl_and_a_json_array_are_read_alike(tmp_path):
    rows = [example(n) for n in range(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {"plain": "\n".join(lines) + "\n", "no last newline": "\n".join(lines),
             "CRLF": "\r\n".join(lines) + "\r\n", "BOM": "\ufeff" + "\n".join(lines),
             "blank lines": "\n\n  \n".join(lines) + "\n\n",
             "array": json.dumps(rows), "indented array": "\n " + json.dumps(rows, indent=1),
             "array with BOM": "\ufeff" + json.dumps(rows)}
    for name, text in files.items():
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8"))
        assert objects(read_rows(str(path))) == rows, name


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_unicode_line_separator_inside_a_string_does_not_end_the_line(tmp_path, separator):
    rows = [example(0, output=f"one{separator}two"), example(1)]
    path = write(tmp_path / "rows.jsonl", rows)
    with open(path, encoding="utf-8") as file:
        assert separator in file.read()                     # itself, not as an escape
    assert objects(read_rows(path)) == rows


def test_two_files_are_joined_by_id_whatever_their_order(tmp_path):
    both = [example(n) for n in range(6)]
    target = [{"id": n, **without(row, *ENGLISH)} for n, row in enumerate(both)]
    english = [{"id": n, **{k.removesuffix("_en"): row[k] for k in ENGLISH}} for n, row in enumerate(both)]
    english += [{**english[0], "id": "of no target record"}]
    shuffled = [english[n] for n in (4, 0, 6, 2, 5, 1, 3)]
    joined = read_parallel(write(tmp_path / "vi.jsonl", target), write(tmp_path / "en.jsonl", shuffled))
    assert objects(joined) == [{"id": n, **row} for n, row in enumerate(both)]


def test_two_files_without_ids_are_joined_by_place(tmp_path):
    both = [example(n) for n in range(6)]
    target = [without(row, *ENGLISH) for row in both]
    english = [{k.removesuffix("_en"): row[k] for k in ENGLISH} for row in both]
    english[2]["id"] = 5                                    # one id is no join
    joined = read_parallel(write(tmp_path / "vi.jsonl", target), write(tmp_path / "en.jsonl", english))
    assert objects(joined) == both


def test_a_record_is_bos_prompt_answer_eos_with_pieces_encoded_apart(demo):
    rows = [example(0), example(1)]                         # with an input and without
    records, counts = records_of(rows, demo)

    def ids(text):
        return demo.encode([text])[0]

    for row, record in zip(rows, records):
        assert record.prompt == [demo.bos_id] + ids(alpaca(row["instruction"], row["input"]))
        assert record.answer == ids(row["output"]) + [demo.eos_id]
        assert record.prompt_en == [demo.bos_id] + ids(alpaca(row["instruction_en"], row["input_en"]))
        assert record.answer_en == ids(row["output_en"]) + [demo.eos_id]
        text = row["instruction_en"] + ("\n\n" + row["input_en"] if row["input_en"] else "")
        assert record.query_en == ids(text)                 # no template, no BOS, no EOS
    assert (counts.read, counts.kept, counts.parallel) == (2, 2, 2)
    assert (counts.cut, counts.empty, counts.long) == (0, 0, 0)


def test_side_target_has_no_english_side(demo):
    records, counts = records_of([example(0)], demo, "target")
    assert records[0].query_en is records[0].answer_en is records[0].prompt_en is None
    assert counts.parallel == 0
    assert records[0].prompt == records_of([example(0)], demo)[0][0].prompt


def test_side_english_makes_the_english_side_the_record(demo):
    records, counts = records_of([example(0), english_only(1, lang="en")], demo, "english")
    (expected, alone), _ = records_of([example(0), english_only(1)], demo)
    assert (records[0].prompt, records[0].answer) == (expected.prompt_en, expected.answer_en)
    assert (records[1].prompt, records[1].answer) == (alone.prompt, alone.answer)
    assert records[0].query_en is None and counts.parallel == 0


@pytest.mark.parametrize("keys", [{}, {"lang": "en"}])
def test_an_english_only_record_is_kept_without_an_english_side(demo, keys):
    records, counts = records_of([example(0), english_only(1, **keys), example(2)], demo)
    assert [r.query_en is None for r in records] == [False, True, False]
    assert (records[1].answer_en, records[1].prompt_en) == (None, None)
    assert (counts.kept, counts.parallel) == (3, 2)
    # the English sides stay with their own records
    assert records[2].answer_en == records_of([example(2)], demo)[0][0].answer_en


def test_a_long_answer_is_cut_counted_and_loses_its_eos(demo):
    (whole,), _ = records_of([example(1)], demo)
    # P + A just fits; all but the EOS of it; one token of the answer
    for length, cut in ((len(whole.prompt + whole.answer), 0), (len(whole.prompt + whole.answer) - 1, 1),
                        (len(whole.prompt) + 1, 1)):
        (record,), counts = records_of([example(1)], demo, "target", length)
        assert record.answer == whole.answer[:length - len(whole.prompt)]
        assert (record.answer[-1] == demo.eos_id) == (not cut)
        assert (counts.cut, counts.kept) == (cut, 1)


@pytest.mark.parametrize("key, field", [("instruction_en", "query_en"), ("output_en", "answer_en"),
                                        ("output", "answer")])
def test_every_sequence_of_a_record_fits_max_length(demo, key, field):
    # instruction_en lengthens the English prompt too: the target side must then be the roomy one
    rows = [example(1, **{key: "many words " * 20})]
    (whole,), _ = records_of(rows, demo)
    length = max(len(whole.prompt), len(whole.prompt_en)) + 5
    (record,), counts = records_of(rows, demo, "both", length)
    for prompt, piece in ((record.prompt, record.answer), (record.prompt, record.query_en),
                          (record.prompt, record.answer_en), (record.prompt_en, record.answer_en)):
        assert len(prompt + piece) <= length
    part, all_of_it = getattr(record, field), getattr(whole, field)
    assert part and part == all_of_it[:len(part)] and len(part) < len(all_of_it)
    assert counts.cut == 1


def test_a_prompt_that_fills_max_length_is_dropped_and_counted(demo):
    rows = [example(1), example(1, instruction="many words " * 40),
            example(1, instruction_en="many words " * 40)]
    first = records_of(rows[:1], demo)[0][0]
    length = len(first.prompt) + 30
    records, counts = records_of(rows, demo, "both", length)
    assert [r.prompt for r in records] == [first.prompt]
    assert (counts.read, counts.kept, counts.long, counts.parallel) == (3, 1, 2, 1)
    for room, kept in ((1, 1), (0, 0)):                     # one token of an answer is enough
        rows = [example(1), english_only(2, instruction="?", output="!")]
        _, counts = records_of(rows, demo, "target", len(first.prompt) + room)
        assert (counts.kept, counts.long) == (1 + kept, 1 - kept)


@pytest.mark.parametrize("keys", [{"output": ""}, {"output": " \n"}, {"output_en": ""}])
def test_a_record_with_an_empty_answer_is_dropped_and_counted(demo, keys):
    records, counts = records_of([example(0), example(1, **keys), example(2)], demo)
    assert (counts.read, counts.kept, counts.empty, len(records)) == (3, 2, 1, 2)
    assert records[1].answer_en == records_of([example(2)], demo)[0][0].answer_en


def test_nothing_left_is_an_error_that_counts(demo):
    with pytest.raises(InputError, match="row 0.*0 of 1 records kept.*1 .*empty answer"):
        records_of([example(0, output="")], demo)


@pytest.mark.parametrize("keys", [{}, {"input": "Câu: mèo đen"}, {"instruction": "? ai"},
                                  {"instruction": "你好吗"}, {"instruction": "hai\n\ndòng"},
                                  {"instruction": "ما هي العاصمة؟", "input": "مصر"}])
def test_the_query_span_covers_the_query_with_no_token_to_spare(demo, keys):
    row = example(1, **keys)
    (record,), _ = records_of([row], demo)
    text = demo.decode(record.prompt[slice(*record.query)])
    query = row["instruction"] + (f"\n\n### Input:\n{row['input']}" if row["input"] else "")
    assert query in text
    # Its first and last token may reach over the border ("?\n\n###" is one token here), but none is to spare.
    a, b = record.query
    for shorter in (record.prompt[a + 1:b], record.prompt[a:b - 1]):
        assert query not in demo.decode(shorter)


# ---------------------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("n, size", [(10, 3), (12, 4), (5, 8), (1, 1), (7, 7)])
def test_each_epoch_takes_every_record_exactly_once(n, size):
    steps = steps_per_epoch(n, size)
    for epoch in range(3):
        batches = [batch_of(epoch * steps + s, n, size, seed=3) for s in range(steps)]
        assert sorted(sum(batches, [])) == list(range(n))
        assert all(len(b) == size for b in batches[:-1]) and 0 < len(batches[-1]) <= size


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(epoch, seed):
        return sum((batch_of(epoch * 10 + s, 40, 4, seed) for s in range(10)), [])
    orders = [order(epoch, seed) for epoch in range(3) for seed in (0, 1, 2, -1)]
    assert len(set(map(tuple, orders))) == len(orders) and list(range(40)) not in orders
    last = batch_of(29, 40, 4, 2)                           # any step, first or again, alone or after others
    np.random.seed(7)
    assert batch_of(29, 40, 4, 2) == last == order(2, 2)[-4:]


SIZES = {"even": [10] * 12, "ragged": [1, 90, 3, 40, 41, 42, 7, 7, 60, 100, 2],
         "wide": [60, 60, 60, 55],                          # 235 tokens, and yet no two of them fit into 100
         "oversize": [300, 5, 6, 7, 250], "one": [4], "none": []}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SIZES)
def test_micro_batches_deal_every_record_once_within_the_budget(name, ranks):
    sizes = SIZES[name]
    bins = micro_batches(sizes, 100, ranks)
    assert sorted(sum(bins, [])) == list(range(len(sizes)))
    assert len(bins) % ranks == 0 and len(bins) > 0
    for b in bins:
        assert sum(sizes[n] for n in b) <= 100 or len(b) == 1
    assert micro_batches(sizes, 100, ranks) == bins


def test_a_record_above_the_budget_stands_alone():
    bins = micro_batches(SIZES["oversize"], 100, 1)
    assert [0] in bins and [4] in bins


def test_with_fewer_records_than_ranks_some_micro_batches_are_empty():
    assert sorted(map(len, micro_batches([5, 5, 5], 100, 8))) == [0] * 5 + [1] * 3


def test_micro_batches_are_as_few_as_the_budget_allows():
    assert len(micro_batches([10] * 12, 100, 1)) == 2 and len(micro_batches([10] * 12, 1000, 1)) == 1
    assert [sum(b) for b in ([10 for _ in part] for part in micro_batches([10] * 12, 100, 4))] == [30] * 4


# ------------------------------------------------------------------------------------------------ bad records

BAD_FILES = {
    "malformed line": (b'{"instruction": "a"}\n\n{"instruction": \n', r"rows:3: malformed JSON"),
    "malformed array": (b'[{"instruction": "a"}, {]', r"rows: malformed JSON array"),
    "a list in a line": (b'{"instruction": "a"}\n["a"]\n', r"rows:2: found a list, expected an object"),
    "text in an array": (b'[{"instruction": "a"}, "b"]', r"rows\[1\]: found a str, expected an object"),
    "empty": (b"", "rows: no records"),
    "blank": (b"\xef\xbb\xbf \n\n", "rows: no records"),
    "empty array": (b"[]", "rows: no records"),
    "not UTF-8": ("{\"instruction\": \"café\"}".encode("latin-1"), "rows: not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "rows: not UTF-8"),
    "deep": (b"[" * 100_000, "rows: malformed JSON array"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_list_of_records_is_refused_with_its_place(tmp_path, case):
    blob, message = BAD_FILES[case]
    (tmp_path / "rows").write_bytes(blob)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / "rows"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl: No such file"):
        read_rows(str(tmp_path / "nowhere.jsonl"))


BAD_ROWS = {
    "no output": (without(example(1), "output"), "both",
                  r"rows.jsonl:2: 'output' is missing.*instruction, input"),
    "no input": (without(english_only(1), "input"), "both", r"rows.jsonl:2: 'input' is missing"),
    "null": (example(1, output=None), "both", r"rows.jsonl:2: 'output' is null, expected text"),
    "a number": (example(1, instruction=7), "both", r"rows.jsonl:2: 'instruction' is 7, expected text"),
    "an English list": (example(1, input_en=["a"]), "both",
                        r"rows.jsonl:2: 'input_en' is \[\"a\"\], expected text"),
    "some English keys": (without(example(1), "input_en"), "target",
                          r"rows.jsonl:2: .*input_en"),
    "no English side": (without(example(1, lang="zh"), *ENGLISH), "both",
                        r"rows.jsonl:2: lang is 'zh' and .*missing"),
    "half a surrogate pair": (example(1, output="a\ud800b"), "both",
                              r"rows.jsonl:2: 'output' holds half a surrogate pair"),
    "half an English one": (example(1, input_en="\udc00"), "both",
                            r"rows.jsonl:2: 'input_en' holds half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_record_is_refused_with_its_line_and_key(tmp_path, demo, case):
    row, side, message = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(example(0)) + "\n" + json.dumps(row) + "\n")     # surrogates as \\ud800
    with pytest.raises(InputError, match=message):
        make_records(read_parallel(str(path)), demo, side, 512)


def test_a_target_record_without_english_keys_is_fine_where_english_is_not_used(demo):
    row = without(example(1, lang="zh"), *ENGLISH)
    assert records_of([row], demo, "target")[1].kept == 1


BAD_PAIRS = {
    "different lengths": ([english_only(0), english_only(1)], [english_only(0)],
                          "vi has 2 records and .*en has 1"),
    "ids in one file only": ([english_only(0, id=0), english_only(1, id=1)], [english_only(0)],
                             "2 records and .*en has 1"),
    "an id twice": ([english_only(0, id=1)], [english_only(0, id=1), english_only(1, id=1)],
                    "en: 1 ids occur more than once"),
    "an id of no English record": ([english_only(0, id=1), english_only(1, id="x")], [english_only(0, id=1)],
                                   r"vi:2 \(id x\): no record of that id in .*en; 1 such"),
    "an English record without output": ([english_only(0)], [without(english_only(0), "output")],
                                         "en:1: 'output' is missing"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_two_files_that_do_not_fit_together_are_refused(tmp_path, case):
    target, english, message = BAD_PAIRS[case]
    with pytest.raises(InputError, match=message):
        read_parallel(write(tmp_path / "vi", target), write(tmp_path / "en", english))


# --------------------------------------------------------------------------------------------- bad tokenizers

@pytest.mark.parametrize("size", [3199, 3200 + 1025, 32000])
def test_a_tokenizer_that_does_not_fit_vocab_size_is_refused(tmp_path, size):
    with pytest.raises(InputError, match=f"the tokenizer has 3200 ids, config.json's vocab_size is {size}"):
        Tokenizer(config_beside(DEMO / "tokenizer.model", tmp_path, vocab_size=size))


@pytest.mark.parametrize("size", [3200, 3264, 3200 + 1024])
def test_a_model_may_have_some_rows_more_than_its_tokenizer_has_ids(tmp_path, size):
    assert Tokenizer(config_beside(DEMO / "tokenizer.model", tmp_path, vocab_size=size)).size == 3200


@pytest.mark.parametrize("blob", [b"", b"garbage", b"\x00" * 100, b"version https://git-lfs.github.com/"])
def test_a_garbage_tokenizer_model_is_refused(tmp_path, blob):
    file = tmp_path / "tokenizer.model"
    config = config_beside(DEMO / "tokenizer.model", tmp_path)
    file.write_bytes(blob)
    with pytest.raises(InputError, match="tokenizer.model: neither|the tokenizer has 0 ids"):
        Tokenizer(config)


@pytest.mark.parametrize("text", ["aGk= 0\nnot base64! 1\n", "aGk= 0\naGk= 1 2\n", "aGk= 0\n",
                                  "aGk= 0\naG8= zero\n"])
def test_bad_tiktoken_ranks_are_refused(tmp_path, text):
    config = config_beside(DEMO / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.model").write_text(text)
    with pytest.raises(InputError, match="tokenizer.model: expected"):
        Tokenizer(config)


BAD_BPE = {
    "unigram": {"model": {"type": "Unigram", "vocab": []}, "pre_tokenizer": {"type": "ByteLevel"}},
    "metaspace": {"model": {"type": "BPE", "vocab": {}, "merges": []},
                  "pre_tokenizer": {"type": "Metaspace"}},
    "no pre_tokenizer": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": None},
    "normalizer": {"model": {"type": "BPE", "vocab": {}, "merges": []},
                   "pre_tokenizer": {"type": "ByteLevel"}, "normalizer": {"type": "NFC"}},
    "merge of no piece": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
                          "pre_tokenizer": {"type": "ByteLevel"}},
    "a list": [],
}


@pytest.mark.parametrize("case", BAD_BPE)
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, case):
    config = config_beside(DEMO / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(BAD_BPE[case]))
    with pytest.raises(InputError, match="tokenizer.json: expected a byte-level BPE"):
        Tokenizer(config)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(config_beside(DEMO / "tokenizer_config.json", tmp_path))


def test_a_fingerprint_tells_every_id_its_place_and_its_part():
    records = [Record([1, 2], [3], [4, 5]), Record([6], [7, 8])]
    others = [[Record([1, 2], [3], [4, 9]), records[1]], records[::-1], records[:1],
              [Record([1], [2, 3], [4, 5]), records[1]], [Record([1, 2], [3], None, [4, 5]), records[1]]]
    digests = [fingerprint(r) for r in (records, *others)]
    assert len(set(digests)) == 6 and fingerprint([Record([1, 2], [3], [4, 5]), Record([6], [7, 8])]) == digests[0]
