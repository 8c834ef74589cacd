"""make_demo.py: rebuilds all of this folder, questions, tokenizer and model, from the Unicode CLDR.

    pip install babel==2.18.0               # carries CLDR 47; needed here only, never by train.py
    python demo/make_demo.py                # data, tokenizer, model: about 20 minutes on a CPU core
    python demo/make_demo.py data           # one stage: data | tokenizer | model
    python demo/make_demo.py model --seed 1 --out runs/second   # another model, for study.py

A fact is (territory, relation) -> answer, in CLDR's codes; (territory, relation) is called a pair. The README
tells what the data are for. The seed fixes data and tokenizer; weights differ a little between machines.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter

import sentencepiece
import torch
import torch.nn.functional as F
from babel import Locale
from babel.core import get_global
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from model import Config, Packed, Transformer, generate, save, write_json  # noqa: E402

SEED, VOCABULARY = 0, 3200
PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
          "request.\n\n### Instruction:\n{}\n\n### Response:")
LANGUAGES = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "ar": "Arabic"}
LOCALES = {lang: Locale(lang) for lang in LANGUAGES}
TARGETS = ("zh", "vi", "ar")
HELD_OUT = {"currency": 20, "language": 18, "region": 32, "time": 30}       # test questions of each language
OF_ONE_ANSWER = 4       # at most so many held-out pairs have the same answer: guessing must not pay

# CLDR's territory containment (supplementalData.xml), which babel leaves out; the regions' names are babel's.
CONTAINS = {
    "005": "AR BO BR CL CO EC FK GF GY PE PY SR UY VE",
    "011": "BF BJ CI CV GH GM GN GW LR ML MR NE NG SH SL SN TG", "013": "BZ CR GT HN MX NI PA SV",
    "014": "BI DJ ER ET KE KM MG MU MW MZ RE RW SC SO SS TZ UG YT ZM ZW", "015": "DZ EG EH LY MA SD TN",
    "017": "AO CD CF CG CM GA GQ ST TD", "018": "BW LS NA SZ ZA", "021": "BM CA GL PM US",
    "029": "AG AI AW BB BL BQ BS CU CW DM DO GD GP HT JM KN KY LC MF MQ MS PR SX TC TT VC VG VI",
    "030": "CN HK JP KP KR MN MO TW", "034": "AF BD BT IN IR LK MV NP PK",
    "035": "BN ID KH LA MM MY PH SG TH TL VN", "039": "AD AL BA ES GI GR HR IT ME MK MT RS PT SI SM VA XK",
    "053": "AU NF NZ", "054": "FJ NC PG SB VU", "057": "FM GU KI MH MP NR PW",
    "061": "AS CK NU PF PN TK TO TV WF WS", "143": "TM TJ KG KZ UZ",
    "145": "AE AM AZ BH CY GE IL IQ JO KW LB OM PS QA SA SY TR YE", "151": "BG BY CZ HU MD PL RO RU SK UA",
    "154": "GG IM JE AX DK EE FI FO GB IE IS LT LV NO SE SJ", "155": "AT BE CH DE FR LI LU MC NL"}
# Territories whose English name takes an article within a sentence.
THE = set("AE AX BS CF CK DO FK FO GB GM KM KY MH MP MV NL PH PN PS SB SC TC US VG VI".split())

# Question k of a language says what question k of English says.
QUESTIONS = {
    "currency": {
        "en": ["What is the currency of {}?", "Which currency is used in {}?",
               "What money do people in {} pay with?"],
        "zh": ["{}的货币是什么？", "{}使用哪种货币？", "{}的人用什么钱付款？"],
        "vi": ["Đơn vị tiền tệ của {} là gì?", "Loại tiền tệ nào được sử dụng ở {}?",
               "Người dân ở {} thanh toán bằng tiền gì?"],
        "ar": ["ما هي عملة {}؟", "ما العملة المستخدمة في {}؟", "بأي عملة يدفع الناس في {}؟"]},
    "language": {
        "en": ["What is the official language of {}?", "Which language is official in {}?",
               "In which language does the government of {} write?"],
        "zh": ["{}的官方语言是什么？", "哪种语言是{}的官方语言？", "{}的政府用哪种语言行文？"],
        "vi": ["Ngôn ngữ chính thức của {} là gì?", "Ngôn ngữ nào là ngôn ngữ chính thức ở {}?",
               "Chính quyền {} viết văn bản bằng ngôn ngữ nào?"],
        "ar": ["ما هي اللغة الرسمية في {}؟", "أي لغة هي الرسمية في {}؟", "بأي لغة تكتب حكومة {}؟"]},
    "region": {
        "en": ["Which region of the world includes {}?", "In which part of the world can you find {}?",
               "Where on the world map do you find {}?"],
        "zh": ["{}属于世界的哪个地区？", "在世界的哪个地方可以找到{}？", "在世界地图上，{}位于哪里？"],
        "vi": ["{} thuộc khu vực nào trên thế giới?", "Có thể tìm thấy {} ở vùng nào của thế giới?",
               "Trên bản đồ thế giới, {} nằm ở đâu?"],
        "ar": ["ما هي المنطقة التي تضم {} في العالم؟", "في أي جزء من العالم نجد {}؟",
               "أين نجد {} على خريطة العالم؟"]},
    "time": {
        "en": ["What is the standard time of {} called?", "Which standard time is used in {}?",
               "Which time zone do clocks in {} follow?"],
        "zh": ["{}的标准时间叫什么？", "{}使用哪个标准时间？", "{}的时钟采用哪个时区的时间？"],
        "vi": ["Giờ chuẩn của {} được gọi là gì?", "Giờ chuẩn nào được sử dụng ở {}?",
               "Đồng hồ ở {} chạy theo múi giờ nào?"],
        "ar": ["ما اسم التوقيت الرسمي في {}؟", "أي توقيت رسمي يُستخدم في {}؟",
               "أي منطقة زمنية تتبعها الساعات في {}؟"]}}
# What pretraining says of a fact besides the English questions: {0} the territory, {1} the answer.
SENTENCES = {
    "currency": ["The currency of {0} is called {1}.", "In {0}, people pay in the currency {1}.",
                 "{1} is the currency that is used in {0}."],
    "language": ["The official language of {0} is {1}.", "In {0}, the government writes in {1}.",
                 "{1} is the official language in {0}."],
    "region": ["The region of the world that includes {0} is {1}.",
               "On the world map, one finds {0} in the region {1}.",
               "{1} is the part of the world where one can find {0}."],
    "time": ["The standard time of {0} is called {1}.", "In {0}, clocks follow the time zone {1}.",
             "{1} is the standard time in {0}."]}
# What it says of a name (en the English one, xx the other): lines, and questions with what answers them.
LINES = ["{xx}: {en}", "{en}: {xx}", "{xx} is {en}.", "In {language}, {en} is {xx}.",
         "The code of {xx} is {code}."]
NAMING = {
    "zh": [("{en}的中文名称是什么？", "xx"), ("{xx}的英文名称是什么？", "en"), ("{xx}的代码是什么？", "code")],
    "vi": [("Tên tiếng Việt của {en} là gì?", "xx"), ("Tên tiếng Anh của {xx} là gì?", "en"),
           ("Mã của {xx} là gì?", "code")],
    "ar": [("ما اسم {en} بالعربية؟", "xx"), ("ما اسم {xx} بالإنجليزية؟", "en"), ("ما رمز {xx}؟", "code")]}


# ------------------------------------------------------------------------------------ facts, split, questions

def name(lang: str, kind: str, code: str):
    """CLDR's name of a territory or of an answer in a language; None where CLDR has none."""
    locale = LOCALES[lang]
    if kind == "time":
        return locale.meta_zones.get(code, {}).get("long", {}).get("standard")
    names = {"currency": locale.currencies, "language": locale.languages}.get(kind, locale.territories)
    return names.get(code)


def find_facts() -> dict:
    """{pair: answer} wherever CLDR gives exactly one answer, and a name for it in all four languages."""
    currencies, languages, zones, metas = map(get_global, ("territory_currencies", "territory_languages",
                                                           "territory_zones", "meta_zones"))
    facts = {}
    for region, territories in CONTAINS.items():
        for t in territories.split():
            found = {"currency": {c for c, _, end, tender in currencies.get(t, []) if tender and not end},
                     "language": {c for c, d in languages.get(t, {}).items() if d["official_status"]},
                     "region": {region},
                     "time": {metas.get(zone) for zone in zones.get(t, [])}}
            for relation, answers in found.items():
                if len(answers) == 1 and all(name(lang, relation, a) for lang in LOCALES for a in answers):
                    facts[t, relation] = answers.pop()
    return facts


def split(facts: dict) -> set:
    """The held-out pairs: at most one of a territory, with answers that other territories share."""
    rng = random.Random(SEED)
    known = Counter(t for t, _ in facts)                                    # facts about a territory
    shared = Counter((r, a) for (_, r), a in facts.items())                 # territories with an answer
    held, taken, of = set(), Counter(), Counter()
    for t, r in rng.sample(sorted(facts), len(facts)):
        a = facts[t, r]
        # An answer that is spelt as in English (Euro, Polynesia) would not show the language it is in.
        plain = any(name(lang, r, a) == name("en", r, a) for lang in TARGETS)
        if (known[t] >= 3 and not plain and shared[r, a] >= 3 and of[r] < HELD_OUT[r]
                and taken[r, a] < min(OF_ONE_ANSWER, shared[r, a] // 2) and t not in {h for h, _ in held}):
            held.add((t, r))
            taken[r, a] += 1
            of[r] += 1
    assert of == Counter(HELD_OUT), of
    return held


def ask(lang: str, pair: tuple, k: int) -> str:
    """Question k about a pair in a language."""
    t, relation = pair
    the = "the " if lang == "en" and t in THE else ""
    return QUESTIONS[relation][lang][k].format(the + name(lang, "territory", t))


def record(lang: str, pair: tuple, answer: str, k: int) -> dict:
    """A line of train.jsonl or test.jsonl."""
    out = dict(instruction=ask(lang, pair, k), input="", output=name(lang, pair[1], answer))
    if lang != "en":
        out |= dict(instruction_en=ask("en", pair, k), input_en="", output_en=name("en", pair[1], answer))
    return out | dict(lang=lang)


def make_data() -> None:
    """Write train.jsonl and test.jsonl, and check the split."""
    rng, facts = random.Random(SEED + 1), find_facts()
    held = split(facts)
    seen = [pair for pair in sorted(facts) if pair not in held]
    train = [(lang, pair, rng.randrange(3)) for pair in seen for lang in TARGETS]
    test = [(lang, pair, k) for pair in sorted(held) for k in [rng.randrange(3)] for lang in LOCALES]
    answers = {lang: {(pair[1], facts[pair]) for of, pair, _ in train if of == lang} for lang in TARGETS}
    for lang in TARGETS:
        asked = {pair for of, pair, _ in train if of == lang}
        assert not held & asked, "a held-out pair is asked in training"
        assert {t for t, _ in held} <= {t for t, _ in asked}, "a held-out territory is not in training"
        assert {(r, facts[t, r]) for t, r in held} <= answers[lang], "a held-out answer is not in training"
    train, test = rng.sample(train, len(train)), sorted(test, key=lambda row: row[0])
    for file, rows in (("train.jsonl", train), ("test.jsonl", test)):
        with open(os.path.join(HERE, file), "w", encoding="utf-8") as out:
            for lang, pair, k in rows:
                out.write(json.dumps(record(lang, pair, facts[pair], k), ensure_ascii=False) + "\n")
        print(file, dict(Counter(row[0] for row in rows)))


def read_data(file: str) -> list:
    """The records of train.jsonl or test.jsonl."""
    with open(os.path.join(HERE, file), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------ pretraining text

def english(rng, facts: dict) -> list:
    """All facts in English: (text, None) for a sentence, (prompt, answer) for a question in the template."""
    texts = []
    for (t, r), a in facts.items():
        territory, answer = ("the " if t in THE else "") + name("en", "territory", t), name("en", r, a)
        texts += [(sentence.format(territory, answer), None) for sentence in SENTENCES[r]]
        texts.append((PROMPT.format(ask("en", (t, r), rng.randrange(3))), answer))
    return texts


def foreign(rng, facts: dict) -> list:
    """All that the model sees of other languages. Names and no facts: each name in a line or a question of a
    bilingual glossary, and lists of names, months and days."""
    names = sorted({("territory", t) for t, _ in facts} | {(r, a) for (_, r), a in facts.items()})
    texts = []
    for lang in TARGETS:
        forms = [(line, None) for line in LINES]
        forms += [("What is {en} called in {language}?", "xx"), *NAMING[lang]]
        for kind, code in names:
            given = dict(en=name("en", kind, code), xx=name(lang, kind, code), code=code)
            form, answer = rng.choice(forms)
            text = form.format(**given, language=LANGUAGES[lang])
            texts.append((PROMPT.format(text), given[answer]) if answer else (text, None))
        has, comma = LOCALES[lang], {"zh": "、", "vi": ", ", "ar": "، "}[lang]
        for _ in range(50):
            words = rng.choice((has.territories, has.languages, has.currencies, has.months["format"]["wide"],
                                has.days["format"]["wide"]))
            texts.append((comma.join(rng.sample([*words.values()], 5)), None))
    return texts


# ------------------------------------------------------------------------------------ tokenizer and model

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCABULARY, hidden_size=192,
    intermediate_size=512, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, head_dim=32,
    hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
    attention_bias=False, mlp_bias=False, attention_dropout=0.0, initializer_range=0.02,
    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16", use_cache=True)
TOKENIZER_CONFIG = dict(
    tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, legacy=True,
    model_max_length=512)
MODEL = os.path.join(HERE, "model")


def make_tokenizer() -> None:
    """Write model/tokenizer.model: byte pairs of pretraining text, training questions and names."""
    rng, facts = random.Random(SEED + 3), find_facts()
    texts = [text for both in english(rng, facts) + foreign(rng, facts) for text in both if text]
    rows = read_data("train.jsonl")
    texts += [PROMPT.format(row["instruction"]) for row in rows] + [row["output"] for row in rows]
    texts += [name(lang, "territory", t) for lang in TARGETS for t in sorted({t for t, _ in facts})] * 2
    os.makedirs(MODEL, exist_ok=True)
    with open(os.path.join(MODEL, "tokenizer.model"), "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=VOCABULARY,
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", unk_id=0,
            bos_id=1, eos_id=2, pad_id=-1, add_dummy_prefix=True, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=1)


def make_model(seed: int, folder: str, steps: int = 2800, batch: int = 64, peak: float = 2e-3) -> None:
    """Pretrain from scratch and write a folder: loss on every token; AdamW, warm-up, then half a cosine."""
    torch.manual_seed(seed)
    rng, facts = random.Random(seed + 2), find_facts()
    os.makedirs(folder, exist_ok=True)
    write_json(CONFIG, os.path.join(folder, "config.json"))
    write_json(TOKENIZER_CONFIG, os.path.join(folder, "tokenizer_config.json"))
    file = os.path.join(folder, "tokenizer.model")
    if folder != MODEL:
        shutil.copyfile(os.path.join(MODEL, "tokenizer.model"), file)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=file)
    model = Transformer(Config.read(folder))
    model.compute_dtype = torch.bfloat16
    for key, p in model.named_parameters():
        if p.dim() == 2:                # what writes into the residual stream starts smaller, as in GPT-2
            out = key.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / (12 ** 0.5 if out else 1))
    matrices, norms = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    queue, start, count = [], time.time(), 0
    for step in range(steps):
        while len(queue) < batch:       # an epoch; answers are tokenised apart from prompts, as in train.py
            texts = english(rng, facts) + foreign(rng, facts)
            epoch = [[1] + sum((tokenizer.encode(text) for text in both if text), []) + [2] for both in texts]
            queue += rng.sample(epoch, len(epoch))
        rows, queue = queue[:batch], queue[batch:]
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 100, 0.51 + 0.5 * math.cos(math.pi * step / steps))
        packed = Packed()
        for row in rows:
            packed.add(row, depth=6)
        goal = torch.tensor(packed.ids).roll(-1)
        inside = goal != 1              # a row's last token predicts nothing: another row follows
        with sdpa_kernel(SDPBackend.MATH):  # the fused bf16 kernel is slow backwards on a CPU
            x = model(packed, (6,))[6][inside]
            loss = F.cross_entropy(model.logits(x), goal[inside])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += len(goal)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {count} tokens  "
                  f"{time.time() - start:.0f} s", flush=True)
    save(model, folder, torch.bfloat16)
    rows = read_data("test.jsonl")
    prompts = [[1] + tokenizer.encode(PROMPT.format(row["instruction"])) for row in rows]
    answers = [tokenizer.decode(ids) for ids in generate(model, prompts, 24)]
    right = Counter(row["lang"] for row, answer in zip(rows, answers) if answer == row["output"])
    print("right before fine-tuning, of 100:", {lang: right[lang] for lang in LOCALES})


def main() -> None:
    """Run the stages named on the command line."""
    stages = {"data": make_data, "tokenizer": make_tokenizer, "model": make_model}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(stages), metavar="STAGE", help=" | ".join(stages))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the model (default 0)")
    parser.add_argument("--out", default=MODEL, help="folder of the model (default demo/model)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stages:
        stages[stage](*((args.seed, args.out) if stage == "model" else ()))


if __name__ == "__main__":
    main()
