"""The looks inside a model, FLORES, suites, and answers on a terminal."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
from data import Tokenizer, make_records, read_rows
from dft import lens
from eval import Item, chrf, main, ngrams, read_sentences
from model import InputError, Tokens, load, read_json

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "demo" / "model")
ZH = ["欧元是法国的货币。", "你好,世界", "他在家。", "猫 坐在垫子上"]
EN = ["The euro is the currency of France.", "Hello, world", "He is at home.", "The cat sits on the mat"]


def flores(folder, zh=ZH, en=EN):
    """FLORES' files of two languages in a folder."""
    folder.mkdir(exist_ok=True)
    for name, texts in (("zho_Hans", zh), ("eng_Latn", en)):
        (folder / f"{name}.devtest").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(folder)


def states(texts):
    """(L + 1, n, D): the mean of transformers' hidden states over each text's tokens, behind BOS."""
    hf = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer, out, inner = Tokenizer(load(DEMO).config), [], {}
    for ids in tokenizer.encode(texts):
        with torch.no_grad():           # its last state is behind the final norm: the last layer's own output
            hook = hf.model.layers[-1].register_forward_hook(lambda m, i, o: inner.update(last=o))
            h = hf(torch.tensor([[tokenizer.bos_id] + ids]), output_hidden_states=True).hidden_states
            hook.remove()
        last = inner["last"][0] if isinstance(inner["last"], tuple) else inner["last"]
        out.append(torch.stack([x.reshape(-1, x.shape[-1])[1:].mean(0) for x in (*h[:-1], last)]))
    return torch.stack(out, 1)


# -------------------------------------------------------------------------------------- lens

def test_the_lens_task_averages_entropies_over_queries_and_reads_the_pivot_where_prompts_end(demo_data, tmp_path):
    out = tmp_path / "lens.json"
    main(["--model", DEMO, "--task", "lens", "--data", demo_data, "--lang", "zh", "--limit", "3", "--out", str(out)])
    found, = read_json(str(out))
    rows = [(place, row) for place, row in read_rows(demo_data) if row.get("lang") == "zh"][:3]
    model = load(DEMO)
    records, _ = make_records(rows, Tokenizer(model.config), "both", 512)
    english, _ = make_records(rows, Tokenizer(model.config), "english", 512)
    L = model.config.num_layers

    def entropies(records):
        each = [lens(model, Tokens.plain([r.prompt], L), torch.arange(*r.query), torch.zeros(r.query[1] - r.query[0], 0,
                                                                                         dtype=torch.long))[0] for r in records]
        return torch.cat(each, 1).mean(1).tolist()
    assert found["records"].startswith("3 of 3 records kept") and len(rows) == 3 and len(found["map"]) == L + 1
    assert found["entropy"] == pytest.approx(entropies(records), rel=1e-4)
    assert found["entropy_en"] == pytest.approx(entropies(english), rel=1e-4)
    assert found["entropy"] != pytest.approx(found["entropy_en"], rel=1e-2)
    hf, top = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), []
    for r in records:
        with torch.no_grad():
            p = hf(torch.tensor([r.prompt])).logits[0, -1].softmax(-1)
        assert r.answer[0] != r.answer_en[0]
        top.append((p[r.answer[0]].item(), p[r.answer_en[0]].item()))
    target, en = (sum(side) / 3 for side in zip(*top))
    assert found["p_target"][L] == pytest.approx(target, rel=1e-3)
    assert found["p_english"][L] == pytest.approx(en, rel=1e-3)


def test_answers_that_begin_with_the_same_token_say_nothing_of_the_pivot(tmp_path):
    path = tmp_path / "same.jsonl"
    row = dict(instruction="问", input="", output="5 x", instruction_en="Q", input_en="", output_en="5 y")
    path.write_text("\n".join(json.dumps(r) for r in (row, {**row, "output": "欧元"})), encoding="utf-8")
    args = ["--model", DEMO, "--task", "lens", "--data", str(path), "--out", str(tmp_path / "lens.json")]
    main(args)
    found, = read_json(str(tmp_path / "lens.json"))
    assert found["records"].startswith("2 of 2 ") and found["pivots"] == 1
    path.write_text(json.dumps(dict(instruction="问", input="", output="5")))
    with pytest.raises(InputError, match="same.jsonl: no record with instruction_en"):
        main(args)


# -------------------------------------------------------------------------------------- align, fertility, pictures

def test_align_compares_mean_states_of_sentences_and_finds_translations(tmp_path):
    out = tmp_path / "align.json"
    main(["--model", DEMO, "--task", "align", "--data", flores(tmp_path / "f"), "--out", str(out)])
    found, = read_json(str(out))
    zh, en = (torch.nn.functional.normalize(states(texts), dim=-1) for texts in (ZH, EN))
    for k, (true, random) in enumerate(zip(found["true"], found["random"])):
        cos = zh[k] @ en[k].T
        assert true == pytest.approx(cos.diagonal().mean().item(), abs=1e-4)
        assert random == pytest.approx((cos.sum() - cos.trace()).item() / 12, abs=1e-4)
        assert found["to_english"][k] == (cos.argmax(1) == torch.arange(4)).float().mean()
        assert found["from_english"][k] == (cos.argmax(0) == torch.arange(4)).float().mean()
    assert len(found["true"]) == load(DEMO).config.num_layers + 1 and found["sentences"] == 4
    main(["--model", DEMO, "--task", "align", "--data", flores(tmp_path / "f", EN, EN), "--out", str(out)])
    found, = read_json(str(out))
    assert min(found["true"]) > 0.9999 and min(found["to_english"] + found["from_english"]) == 1


def test_fertility_counts_tokens_by_sentence_and_letter_and_to_english(tmp_path, capsys):
    main(["--model", DEMO, "--task", "fertility", "--data", flores(tmp_path / "f")])
    zh, en = (sum(map(len, Tokenizer(load(DEMO).config).encode(texts))) for texts in (ZH, EN))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    letters = sum(map(len, ZH))
    assert ["zh", "4", str(round(zh / 4, 2)), str(round(zh / letters, 3)), str(round(zh / en, 3))] in rows
    assert rows[2][0] == "en" and rows[2][-1] == "1.0"


def test_two_models_are_drawn_on_one_picture(tmp_path, demo_data):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    sizes = []
    for task, data, models in (("lens", demo_data, [DEMO, DEMO]), ("align", flores(tmp_path / "f"), [DEMO])):
        path = str(tmp_path / f"{task}.png")
        main(["--model", *models, "--task", task, "--data", data, "--limit", "4", "--plot", path])
        image = matplotlib.image.imread(path)
        sizes.append(image.shape[:2])
        assert image[..., :3].std() > 0.05 and os.path.getsize(path) < 200_000
    assert sizes[0] == (2 * sizes[1][0], sizes[1][1])


@pytest.mark.parametrize("arguments, said", [
    (["--task", "align", "--data", "{}", "--lang", "vi"], "--task align needs vi and en; .* has en, zh"),
    (["--task", "align", "--data", "{}", "--layer", "99"], "--layer 99: .* has layers 0 to "),
    (["--task", "align", "--data", "{}/zho_Hans.devtest"], "zho_Hans.devtest:1: malformed JSON"),
    (["--task", "align", "--data", "{}/zho_Hans.devtest", "--data_en", "{}/short"], "equally many .* zh 4, en 1"),
    (["--task", "fertility", "--data", "{}/zho_Hans.devtest", "--data_en", "{}/gone"], "gone: No such file"),
    (["--task", "lens"], "--task lens needs --data FILE"), (["--task", "xnli", "--data", "x", "--plot", "y"], "--plot"),
    (["{}", "--task", "mkqa", "--data", "x"], "--model has 2 folders"), (["--limit", "0"], "--limit is 0"),
    (["--task", "xcopa", "--data", "{}", "--data_en", "{}"], "xcopa takes one file"),
    (["--suite", "x"], "give --model DIR, or --suite FILE"),
    (["--task", "xcopa", "--lang", "ar", "--data", "{}"], "--lang ar: xcopa has zh, vi"),
    (["--task", "flores", "--lang", "zh", "--data", "{}"], "--lang zh: flores has en-zh"),
])
def test_what_cannot_be_is_refused_in_one_line(arguments, said, tmp_path):
    folder = flores(tmp_path / "f")
    (tmp_path / "f" / "short").write_text("one\n")
    (tmp_path / "f" / "short").rename(tmp_path / "short")
    arguments = [a.replace("{}/short", str(tmp_path / "short")).replace("{}", folder) for a in arguments]
    with pytest.raises(InputError, match=said):
        main(["--model", DEMO, *arguments, *(["--lang", "zh"] if "--data_en" in arguments else [])])


# -------------------------------------------------------------------------------------- translation

def test_flores_is_read_from_a_folder_from_two_files_and_from_the_hubs_rows(tmp_path):
    folder, hub = flores(tmp_path / "f"), tmp_path / "hub.jsonl"
    hub.write_text("\n".join(json.dumps(dict(id=n, sentence_zho_Hans=z, sentence_eng_Latn=e))
                             for n, (z, e) in enumerate(zip(ZH, EN))), encoding="utf-8")
    for data in ([folder], [f"{folder}/zho_Hans.devtest", f"{folder}/eng_Latn.devtest"], [str(hub)]):
        assert read_sentences(data, "zh") == dict(zh=ZH, en=EN)
        items = evaluation.read_task(data, "flores", "zh-en")
        assert items[1] == Item("Chinese sentence: 你好,世界\nEnglish sentence:", [], ["Hello, world"]) and len(items) == 4


def test_chrf_and_bleu_are_sacrebleus(capsys):
    sacrebleu = pytest.importorskip("sacrebleu", reason="it is the yardstick of chrF: pip install sacrebleu")
    pairs = [("The cat sat on a mat.", "the cat sits on the mat"), ("", "x"), ("猫坐在垫子上。", "一只猫 坐在垫子上"),
             ("a", "a"), ("unrelated", "zzz"), ("قط على الحصيرة", "القط على حصيرة")]
    for text, gold in pairs:
        assert chrf(ngrams(text, gold)) == pytest.approx(sacrebleu.sentence_chrf(text, [gold]).score / 100, abs=1e-6)
    lines = [dict(prompt="", text=text, gold=[gold], **evaluation.translated(Item("", [], [gold]), text, "en-zh"))
             for text, gold in pairs]
    texts, golds = zip(*pairs)
    for lang, words in (("en-zh", "zh"), ("zh-en", "13a")):
        scores = evaluation.translation(lines, lang)
        assert scores["chrf"]["mean"] == pytest.approx(sacrebleu.corpus_chrf(texts, [golds]).score / 100, abs=1e-6)
        bleu = sacrebleu.corpus_bleu(texts, [golds], tokenize=words).score / 100
        assert (scores["bleu"]["mean"], scores["bleu"]["tokenizer"]) == (pytest.approx(bleu), words)
    assert scores["chrf_of_sentences"]["mean"] != pytest.approx(scores["chrf"]["mean"], abs=1e-3)


# -------------------------------------------------------------------------------------- suites

def write_suite(tmp_path, models, **more):
    """A suite of three tasks on made-up items."""
    xcopa = [dict(premise=f"他来了{n}。", choice1="好的。", choice2="不好。", question="cause", label=n % 2) for n in range(5)]
    mkqa = [dict(queries=dict(zh_cn=f"谁{n}?"), answers=dict(zh_cn=[dict(text="甲")])) for n in range(3)]
    for name, rows in (("xcopa", xcopa), ("mkqa", mkqa)):
        (tmp_path / name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    f = flores(tmp_path / "f")
    names = "\n".join(f'"{title}" = "{folder}"' for title, folder in models.items())
    (tmp_path / "suite.toml").write_text(
        f'out = "{tmp_path}/parts"\n[models]\n{names}\n[tasks]\nxcopa.zh = "{tmp_path}/xcopa"\n'
        f'mkqa.zh = "{tmp_path}/mkqa"\nflores.zh-en = ["{f}/zho_Hans.devtest", "{f}/eng_Latn.devtest"]\n')
    return str(tmp_path / "suite.toml")


def test_a_suite_prints_the_papers_tables_and_goes_on_where_it_was(tmp_path, capsys):
    suite = write_suite(tmp_path, {"before": DEMO, "a b/c": DEMO})
    main(["--suite", suite, "--limit", "2"])
    said, parts = capsys.readouterr().out, tmp_path / "parts"
    result = read_json(str(parts / "a_b_c_xcopa_zh.json"))
    assert f"| before | {100 * result['scores']['acc']['mean']:.2f} |" in said and "| | xcopa zh, acc |" in said.replace(
        "|  |", "| |")
    assert said.index("Table 1: generation") < said.index("Table 2: understanding") < said.index("Translation")
    assert "mkqa zh, f1_all" in said and "flores zh-en, chrf" in said and "the paper" not in said
    assert result["limit"] == 2 and result["scores"]["acc"]["n"] == 2 and len(result["data_sha256"]) == 64
    assert result["split"] == "unknown" and result["items_in_file"] == 5 and result["normaliser"] is None
    assert len((parts / "before_mkqa_zh.items.jsonl").read_text().splitlines()) == 2
    assert said.count("measured") == 6 and "kept" not in said
    os.remove(parts / "before_mkqa_zh.json")
    main(["--suite", suite, "--limit", "2"])
    said = capsys.readouterr().out
    assert said.count("measured") == 1 and said.count("kept") == 5
    (tmp_path / "xcopa").write_text((tmp_path / "xcopa").read_text().replace("好的", "好吧"))
    main(["--suite", suite, "--limit", "2"])                # the file is another one now
    assert capsys.readouterr().out.count("measured") == 2
    main(["--suite", suite, "--limit", "1"])
    assert capsys.readouterr().out.count("measured") == 6


def test_two_ranks_give_what_one_gives(tmp_path):
    suite = write_suite(tmp_path, {"one": DEMO})
    main(["--suite", suite])
    alone = {path.name: path.read_text() for path in (tmp_path / "parts").iterdir()}
    for path in (tmp_path / "parts").iterdir():
        path.unlink()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "eval.py"), "--suite", suite], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("measured") == 3, done.stderr
    for name, text in alone.items():
        got = (tmp_path / "parts" / name).read_text().splitlines()
        for a, b in zip(got, text.splitlines(), strict=True):
            a, b = (json.loads(line) if name.endswith("l") else line for line in (a, b))
            if name.endswith("l") and "loglikelihoods" in a:
                assert a.pop("loglikelihoods") == pytest.approx(b.pop("loglikelihoods"), abs=1e-4)
            assert a == b


def test_the_papers_numbers_stand_beside_llama2_7b_alone(tmp_path, capsys):
    config = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
                  intermediate_size=11008)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    suite = write_suite(tmp_path, {"ours": str(tmp_path / "m")})
    args = evaluation.parse(["--suite", suite])
    (tmp_path / "parts").mkdir()
    for task, lang, data, score in (("xcopa", "zh", [f"{tmp_path}/xcopa"], "acc"), ("mkqa", "zh", [f"{tmp_path}/mkqa"], "f1_all"),
                                    ("flores", "zh-en", [f"{tmp_path}/f/{n}.devtest" for n in ("zho_Hans", "eng_Latn")], "chrf")):
        s = evaluation.setting(args, str(tmp_path / "m"), task, lang, data)
        part = tmp_path / "parts" / f"ours_{task}_{lang}.json"
        part.write_text(json.dumps({**s, "scores": {score: dict(mean=0.5, n=5)}}))
    evaluation.suite(args)                                  # nothing to measure: there are no weights
    said = capsys.readouterr().out
    assert "| ours | 50.00 |\n| SFT, the paper | 65.0 |\n| TFT, the paper | 65.0 |\n| DFT-logits, the paper | 66.4 |" in said
    assert "| ours | 50.00 |\n| TFT, the paper | 40.7 |\n| DFT-logits, the paper | 40.87 |" in said
    assert said.rstrip().splitlines()[-3:][0] == "| ours | 50.00 |", "it has none for FLORES"


def test_questions_to_models_that_we_tuned_stand_in_the_alpaca_template(tmp_path):
    tuned = tmp_path / "run" / "model"
    tuned.parent.mkdir()
    tuned.symlink_to(DEMO)
    (tmp_path / "run" / "settings.json").write_text("{}")
    (tmp_path / "q.jsonl").write_text("{}")
    for more, model, task, expected in (
            ([], tuned, "mkqa", "alpaca"), ([], DEMO, "mkqa", "none"), ([], tuned, "xcopa", "none"),
            (["--template", "none"], tuned, "mkqa", "none"), (["--template", "alpaca"], DEMO, "mkqa", "alpaca")):
        args = evaluation.parse(["--model", str(model), *more])
        assert evaluation.setting(args, str(model), task, "zh", [str(tmp_path / "q.jsonl")])["template"] == expected


@pytest.mark.parametrize("text, said", [
    ("out = ", "Invalid value"), ("[models]\na = 'b'", "'tasks'"), ("out = 'x'\n[models]\na = 'b'\n[tasks]\nsquad.zh = 'x'",
                                                                    "tasks squad; known: xnli"),
    ("out = 'x'\n[models]\n[tasks]\nxnli.zh = 'x'", "expected out = "), ("out = 'x'\nmodels = 1\ntasks = 2", "expected out = ")])
def test_a_wrong_suite_is_refused_with_what_it_should_be(text, said, tmp_path):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(InputError, match=f"s.toml: .*{said}"):
        main(["--suite", str(tmp_path / "s.toml")])


# -------------------------------------------------------------------------------------- answers on a terminal

def test_every_line_typed_is_answered_letter_by_letter(monkeypatch, capsys):
    questions = ["What is the currency of France?", "法国使用哪种货币？"]
    model = load(DEMO)
    expected = evaluation.answer(model, Tokenizer(model.config), [(q, "") for q in questions], 256)
    lines, pieces = iter(questions), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("builtins.print", lambda *a, **more: pieces.append(a[0] if a else "\n") if "file" not in more
                        else None)
    with pytest.raises(StopIteration):
        main(["--model", DEMO, "--template", "alpaca"])
    assert "".join(pieces).split("\n")[:2] == expected and len(pieces) > 4


def test_half_a_character_is_not_shown(monkeypatch, capsys):
    pieces = Tokenizer(load(DEMO).config).sp
    ids = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "欧元".encode()]
    assert len(set(ids)) > 4 and pieces.unk_id() not in ids
    monkeypatch.setattr(evaluation, "decode", lambda *_: ([(0, token)] for token in ids))
    shown = []
    monkeypatch.setattr("builtins.print", lambda *a, **more: shown.append(a) if "end" in more else None)
    main(["--model", DEMO, "--prompt", "x"])
    assert [text for text, in shown] == ["欧", "元"]
