"""data.py: tokenizers against those of transformers, records against the template, batches against their promises.

    python -m pytest tests/test_data.py
"""
import functools
import json
import shutil

import pytest
import sentencepiece
from conftest import ROOT
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from data import Tokenizer, batch_of, make_records, micro_batches, read_parallel, read_rows, steps_per_epoch
from model import Config, InputError

DEMO = ROOT / "demo" / "model"


# ---------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "a", "Hello, world!", " leading", "  two leading", "trailing ", "trailing  ", " both ",
    "a  b   c    d", "a\n b\n  c\n\n\nd", "\t tab\tand\ttab", "carriage\r\nreturn\r", "line\u2028separator\u2029here",
    "Don't I'LL we've they're it's O'Neill 'tis", "0 1 23 456 7890 12345678", "1,234.56 + 7 = x2y3", "v1.2.3-rc4", "1 2  3   4",
    "你好，世界！这是一个测试。", "用 Python 写一个函数，计算 123 的平方。", "全角１２３　空格", "繁體中文與注音ㄅㄆㄇ",
    "Xin chào thế giới, tiếng Việt có dấu.", "Hãy giải thích câu tục ngữ «có công mài sắt, có ngày nên kim».",
    "Decomposed: tie\u0302\u0301ng Vie\u0323\u0302t", "مرحبا بالعالم", "ما هي عاصمة مصر؟ ١٢٣ ٪", "مَرْحَبًا",
    "😀", "family 👩‍👩‍👧‍👦 flag 🇻🇳 tone 👍🏽", "rare 𠮷 𝔘 ꙮ", "non\u00a0breaking \u200bzero width", "½ Ⅳ ² ①",
    "def f(x):\n    return x ** 2  # comment\n\n\tif x: pass\n", "<table><tr><td>1</td></tr></table>", "[link](http://a.b/c?d=e&f#g)",
    "~~~ !!! ... --- ((())) {}[] ''\"\" ``` \\n", "ALLCAPS camelCase snake_case", "naïve café Übergröße ñandú Привет κόσμε",
    "### Instruction:\nTranslate.\n\n### Response:",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<2mass>", "<start_of_turn>", "<end_of_turn>", "<unused3>",
           "<unused99>", "[@BOS@]", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
           "<|endoftext|>", "<0x0A>", "[INST]"]


def config_beside(tokenizer_file, folder, **keys):
    """A Config whose folder holds a copy of a tokenizer file."""
    shutil.copy(tokenizer_file, folder)
    base = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**base, **keys}))
    return Config.read(str(folder))


def published_llama(file):
    """The tokenizer.json that is published with LLaMA-2, rebuilt from its tokenizer.model: merges in the order of their
    scores, a prefix space even before a space. transformers 5's own conversion of a bare tokenizer.model orders merges
    by id and adds no second space, which gives other ids for "a  b" and " leading"."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    scores = {piece: sp.get_score(i) for piece, i in vocab.items() if not sp.is_byte(i)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True,
                                    unk_token="<unk>"))
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
        return Tokenizer(Config.read(folder)), theirs, set(theirs.all_special_ids) | set(theirs.added_tokens_decoder)
    shared = request.getfixturevalue("shared") / "data"
    if name == "stories260K":
        folder = shared / "checkpoints" / name      # with a tokenizer.json beside it, which Tokenizer does not look at
        return Tokenizer(Config.read(str(folder))), AutoTokenizer.from_pretrained(folder), {0, 1, 2}
    file, folder = shared / "tokenizers" / name / "tokenizer.model", tmp_path_factory.mktemp(name)
    if name == "llama2":
        return Tokenizer(config_beside(file, folder, vocab_size=32000)), published_llama(file), {0, 1, 2}
    if name == "gemma2":
        ours = Tokenizer(config_beside(file, folder, vocab_size=256000, bos_token_id=2, eos_token_id=1))
        vocab = GemmaTokenizer.from_pretrained(folder)
        return ours, vocab, {vocab.convert_tokens_to_ids(t) for t in SPECIAL if t in vocab.get_vocab()} - {217 + 10}
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
