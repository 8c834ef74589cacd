"""model.py against transformers: equal numbers from equal folders, and a clear refusal of others.

    python -m pytest tests/test_model.py
"""
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EPS, LLAMA3_ROPE, assert_close, hf_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import Config, InputError, Packed, generate, hf_name, load, read_json, save, write_json

FAMILIES = ["llama2", "llama3", "smollm2", "gemma2"]
LENGTHS = (23, 1, 40, 9)    # 40 is beyond Gemma-2's window of 8 and LLaMA-3's first context of 32
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BIAS, OLD = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"


def random_rows(lengths, vocab=97):
    return [torch.randint(3, vocab, (n,)).tolist() for n in lengths]


def pack(rows, depth=4):
    packed = Packed()
    for ids in rows:
        packed.add(ids, depth)
    return packed


def next_token_loss(logits, rows):
    """Cross-entropy of every next token, summed; logits: a tensor (T, V) for each row."""
    loss = 0
    for row_logits, ids in zip(logits, rows):
        loss = loss + F.cross_entropy(row_logits[:-1], torch.tensor(ids)[1:], reduction="sum")
    return loss


# ------------------------------------------------------------------------------------ the numbers

def assert_equals_transformers(folder, rows, magnify=1):
    """Every layer's output, the logits and all gradients: ours in one pass, theirs row by row.

    magnify: how much larger the rounding errors of gradients are than assert_close() expects.
    """
    ours, theirs = load(folder), hf_model(folder)
    L = ours.config.num_hidden_layers
    h = ours(pack(rows, L), tuple(range(L + 1)))
    logits = ours.logits(h[L])
    h[L] = ours.norm(h[L])                      # transformers' last state is taken after the norm
    out = [theirs(torch.tensor([ids]), output_hidden_states=True) for ids in rows]
    for k in range(L + 1):
        assert_close(h[k], torch.cat([one.hidden_states[k][0] for one in out]), f"layer {k}")
    assert_close(logits, torch.cat([one.logits[0] for one in out]), "logits")
    next_token_loss(logits.split([len(ids) for ids in rows]), rows).backward()
    next_token_loss([one.logits[0] for one in out], rows).backward()
    gradients = {hf_name(name): p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert_close(gradients[name], expected[name], name, 1000 * magnify * EPS)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_logits_and_gradients_are_those_of_transformers(family, name):
    # The gemma2 family has scores s of up to 50, and exp(s) is off by s * EPS.
    magnify = 50 if name == "gemma2" else 1
    assert_equals_transformers(family(name), random_rows(LENGTHS), magnify)


def test_stories260k_is_computed_as_in_transformers(shared):
    folder = str(shared / "data" / "checkpoints" / "stories260K")
    assert_equals_transformers(folder, random_rows((30, 4), 512))


def test_smollm2_is_computed_as_in_transformers(smollm2):
    # The first token's state is over 100 times as long as the others, its rounding errors too.
    assert_equals_transformers(smollm2, random_rows((7, 3), 49152), magnify=100)


@pytest.mark.parametrize("name, entries", [
    ("llama3", dict(rope_parameters=LLAMA3_ROPE | dict(rope_type="default"))),      # no scaling
    ("llama3", dict(rope_parameters=LLAMA3_ROPE | dict(low_freq_factor=2.0))),      # another ramp
    ("gemma2", dict(sliding_window=16)), ("gemma2", dict(query_pre_attn_scalar=16)),
    ("gemma2", dict(attn_logit_softcapping=None)), ("gemma2", dict(final_logit_softcapping=None))])
def test_the_comparison_sees_another_window_cap_scale_or_rope(family, name, entries, tmp_path):
    logits, packed = [], pack(random_rows(LENGTHS))
    for folder in (family(name), variant(family(name), tmp_path / "other", **entries)):
        model = load(folder)
        logits.append(model.logits(model(packed, (4,))[4]))
    assert (logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max()


# -------------------------------------------------------------------------- segments and layers

@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_each_segment_of_a_row_equals_a_pass_of_prompt_and_segment(family, name):
    """The segments share the prompt, do not see each other, and are dropped at their depth."""
    model = load(family(name))
    other, prompt, *ids = random_rows((5, 11, 6, 10, 13))
    packed = pack([other])
    first, depths = packed.add(prompt, depth=4), (4, 1, 3)
    segments = [packed.add(one, depth, after=first) for one, depth in zip(ids, depths)]
    h = model(packed, (0, 1, 2, 3, 4))
    assert [len(h[k]) for k in range(5)] == [45, 45, 35, 35, 22]
    for one, segment, depth in zip(ids, segments, depths):
        plain = model(pack([prompt + one]), (0, 1, 2, 3, 4))
        for k in range(depth + 1):
            indices = packed.index([*first, *segment], k)
            assert_close(h[k][indices], plain[k], f"segment of depth {depth}, layer {k}")


def test_no_layer_above_the_highest_one_asked_for_is_computed(family):
    model, packed = load(family("llama2")), pack(random_rows((5, 3)))
    whole = model(packed, (2, 3, 4))
    model.layers[2].forward = None              # a call would fail
    out = model(packed, (0, 2))
    assert out.keys() == {0, 2} and torch.equal(out[2], whole[2])


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_activation_checkpointing_keeps_less_and_gives_equal_gradients(family, name):
    rows, gradients, kept = random_rows((19, 4)), [], []
    for checkpointing in (False, True):
        model, saved = load(family(name)), []

        def save_tensor(tensor):
            saved.append(tensor.numel())
            return tensor

        for layer in model.layers:
            layer.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor):
            logits = model.logits(model(pack(rows), (4,))[4])
        next_token_loss(logits.split([19, 4]), rows).backward()
        kept.append(sum(saved))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    for key in gradients[0]:
        assert_close(gradients[1][key], gradients[0][key], key)


# ------------------------------------------------------------------------------------ generation

def hf_generate(model, prompt, n, eos):
    """transformers' greedy continuation of one prompt, without the end token."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, pad_token_id=0,
                         do_sample=False, eos_token_id=eos)[0, len(prompt):].tolist()
    return out[:-1] if out[-1] in eos else out


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_different_lengths_are_continued_as_by_transformers_one_by_one(family, name):
    model, theirs = load(family(name)), hf_model(family(name))
    torch.manual_seed(3)    # the best id leads by 5,000 EPS or more, so that rounding is harmless
    prompts = random_rows((3, 14, 1, 30, 7))            # within Gemma-2's window, across, beyond it
    expected = [hf_generate(theirs, prompt, 12, list(model.config.eos_ids)) for prompt in prompts]
    assert len(set(sum(expected, []))) > 10             # not one token over and over
    assert generate(model, prompts, 12) == expected
    assert [generate(model, [prompt], 12)[0] for prompt in prompts] == expected


def test_rows_end_before_any_end_token_and_after_any_id_in_last(family, tmp_path):
    torch.manual_seed(3)                                # text that varies, see above
    prompts = random_rows((3, 14, 1))
    free = generate(load(family("llama2")), prompts, 10)
    token = next(i for i in free[1][3:] if i not in free[1][:3])        # first at place 3 or later
    begins = [out[:out.index(token)] if token in out else out for out in free]
    assert 3 <= len(begins[1]) < 10
    for file in ("config.json", "generation_config.json"):
        path = os.path.join(variant(family("llama2"), tmp_path / file), file)
        write_json(read_json(path) | {"eos_token_id": [2, token]}, path)
        model = load(os.path.dirname(path))
        assert model.config.eos_ids == (2, token)       # training teaches the first
        assert generate(model, prompts, 10) == begins
    ends = [begin + out[len(begin):][:1] for begin, out in zip(begins, free)]
    assert generate(load(family("llama2")), prompts, 10, last=(token,)) == ends


def test_generation_ends_at_max_new_tokens_and_at_the_last_position(family):
    model = load(family("llama2"))                      # 128 positions
    prompts = random_rows((3, 120, 127))
    free = generate(model, prompts, 20)
    assert [len(out) for out in free] == [20, 8, 1]
    assert generate(model, prompts, 1) == [out[:1] for out in free]
    assert generate(model, prompts, 0) == [[], [], []]
    for length in (0, 128):
        with pytest.raises(InputError, match=f"{length} tokens.* 1 to 127"):
            generate(model, [[5] * length], 3)


# ------------------------------------------------------------------------------------ folders out

def variant(folder, target, change=None, without=(), **entries):
    """A copy of a model folder with other entries in config.json and the tensors of change()."""
    shutil.copytree(folder, target)
    raw = read_json(os.path.join(folder, "config.json")) | entries
    write_json({key: raw[key] for key in raw if key not in without}, f"{target}/config.json")
    if change:
        path = os.path.join(target, "model.safetensors")
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(target)


def hf_logits(folder, **how):
    ids = torch.tensor([[5, 60, 7, 30, 8, 9, 77, 11, 12, 41]])
    return AutoModelForCausalLM.from_pretrained(folder, **how)(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_a_saved_model_with_equal_logits(family, name, dtype, tmp_path):
    folder = str(tmp_path / "saved")
    save(load(family(name)), folder, dtype)
    expected = hf_logits(family(name), dtype=dtype)
    assert torch.equal(hf_logits(folder), expected) and expected.dtype == dtype
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:    # read by version 4
        assert file.metadata() == {"format": "pt"} and file.get_tensor(NORM).dtype == dtype
    assert os.listdir(tmp_path) == ["saved"]            # no partial folder is left


def test_a_model_in_several_files_is_read_whole_or_not_at_all(family, tmp_path):
    folder, model = str(tmp_path / "saved"), load(family("smollm2"))
    hf_model(family("smollm2")).save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(file for file in os.listdir(folder) if file.endswith(".safetensors"))
    again = dict(load(folder).named_parameters())
    assert len(shards) > 2
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())
    os.remove(os.path.join(folder, shards[1]))
    with pytest.raises(InputError, match=r"\d+ missing, such as model\.layers"):
        load(folder)


def test_save_keeps_tokenizer_files_and_end_tokens_and_may_replace_its_own_source(family, tmp_path):
    folder = variant(family("llama2"), tmp_path / "model")
    write_json({"eos_token_id": [2, 96]}, os.path.join(folder, "generation_config.json"))
    for name in ("tokenizer.model", "tokenizer.json", "old"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(name)
    model = load(folder)
    save(model, folder, chat_template="a template")
    assert sorted(os.listdir(folder)) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    # transformers 5 reads the template in the .jinja file, transformers 4 in tokenizer_config.json
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == "a template"
    tokenizer_config = read_json(os.path.join(folder, "tokenizer_config.json"))
    assert tokenizer_config == {"chat_template": "a template"}
    again = load(folder)
    assert torch.equal(again.head_weight, model.head_weight) and again.config.eos_ids == (2, 96)


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_in_the_form_of_transformers_4_and_5_are_read_and_written(family, name, tmp_path):
    new = read_json(os.path.join(family(name), "config.json"))
    rope = new["rope_parameters"]               # transformers 5 wrote this form, without the older
    assert "rope_theta" not in new and "rope_scaling" not in new
    save(load(family(name)), str(tmp_path / "both"))
    both = read_json(str(tmp_path / "both" / "config.json"))
    assert both["rope_theta"] == rope["rope_theta"] and both["rope_parameters"] == rope
    if name == "llama3":
        assert both["rope_scaling"] | {"rope_theta": 10000.0} == rope
        assert type(both["rope_scaling"]["original_max_position_embeddings"]) is int
    old = variant(tmp_path / "both", tmp_path / "old", without=("rope_parameters", "dtype"))
    configs = [dataclasses.replace(Config.read(folder), raw={}, files={}, folder="")
               for folder in (family(name), str(tmp_path / "both"), old)]
    assert configs[0] == configs[1] == configs[2]
    assert torch.equal(hf_logits(old), hf_logits(family(name)))


# ------------------------------------------------------------------------------------- folders in


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_stored_weights_of_any_float_dtype_are_read_in_the_dtype_asked_for(family, tmp_path, dtype):
    def change(tensors):
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return tensors | {OLD: torch.ones(4)}           # a buffer of old files, not needed
    model = load(variant(family("llama2"), tmp_path / "other", change, pretraining_tp=2))
    source = dict(load(family("llama2")).named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, source[name].to(dtype).float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tied_head_that_is_stored_too_must_be_the_embedding(family, tmp_path, dtype):
    def change(tensors, more=0):
        return tensors | {HEAD: (tensors[EMBEDDING] + more).to(dtype)}
    same = load(variant(family("smollm2"), tmp_path / "same", change))
    assert torch.equal(same.head_weight, load(family("smollm2")).head_weight)
    with pytest.raises(InputError, match=f"{HEAD} differs from {EMBEDDING}"):
        load(variant(family("smollm2"), tmp_path / "other", lambda tensors: change(tensors, 1)))


BAD_WEIGHTS = {
    "one missing": (lambda t: {n: t[n] for n in t if n != NORM}, f"1 missing, such as {NORM}"),
    "a bias": (lambda t: t | {BIAS: torch.ones(32)}, f"1 not expected, such as {BIAS}"),
    "other shape": (lambda t: t | {GATE: torch.ones(32, 44)},
                    rf"{GATE} is F32 \[32, 44\], expected floats \[44, 32\]"),
    "integers": (lambda t: t | {NORM: torch.ones(32, dtype=torch.int8)}, f"{NORM} is I8"),
    "without model.": (lambda t: {n.removeprefix("model."): t[n] for n in t},
                       f"38 missing, such as {EMBEDDING}.*38 not expected, such as embed_tokens"),
    "of torch.compile": (lambda t: {"_orig_mod." + n: t[n] for n in t},
                         "39 missing, .*39 not expected, such as _orig_mod"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_match_the_config_are_named(family, tmp_path, case):
    change, message = BAD_WEIGHTS[case]
    with pytest.raises(InputError, match=message):
        load(variant(family("llama2"), tmp_path / "bad", change))


@pytest.mark.parametrize("kinds", [["sliding"] * 4, ["full_attention"]])
def test_wrong_layer_types_of_gemma_are_refused(family, tmp_path, kinds):
    with pytest.raises(InputError, match="layer_types is .*, expected sliding_attention or full"):
        load(variant(family("gemma2"), tmp_path / "model", layer_types=kinds))


def test_a_tensor_in_two_files_is_refused(family, tmp_path):
    folder = variant(family("llama2"), tmp_path / "model")
    shutil.copy(f"{folder}/model.safetensors", f"{folder}/more.safetensors")
    with pytest.raises(InputError, match="more.safetensors: .*is in another file as well"):
        load(folder)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(family, tmp_path, value):
    def change(tensors):
        tensors[GATE][0, 0] = value
        return tensors
    with pytest.raises(InputError, match="gate_proj.weight has numbers that are inf or NaN"):
        load(variant(family("llama2"), tmp_path / "model", change))


def test_pickles_are_refused_and_no_code_in_them_is_run(family, tmp_path):
    folder = variant(family("llama2"), tmp_path / "model")
    weights, pickle = (tmp_path / "model" / name for name in ("model.safetensors", "model.bin"))
    pickle.write_text(f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR.")    # calls os.mkdir() when loaded
    load(folder)                                # the pickle beside model.safetensors is not read
    weights.unlink()
    with pytest.raises(InputError, match="no .safetensors file.*pickles.*never loaded"):
        load(folder)
    pickle.rename(weights)
    with pytest.raises(InputError, match="model.safetensors: not a safetensors file"):
        load(folder)
    assert os.listdir(tmp_path) == ["model"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2468\n"


@pytest.mark.parametrize("content", [b"", LFS, "all but the last byte"])
def test_a_git_lfs_pointer_and_an_incomplete_file_are_named(family, tmp_path, content):
    path = tmp_path / "model" / "model.safetensors"
    folder = variant(family("llama2"), tmp_path / "model")
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors: not a safetensors .*git lfs pull"):
        load(folder)


BAD_CONFIGS = {
    "another family": (dict(model_type="qwen2"), "model_type is 'qwen2', expected llama or gemma2"),
    "biases, quantized": (dict(attention_bias=True, quantization_config=dict(bits=4)),
                          "attention_bias=True, quantization_config="),
    "yarn": (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope type 'yarn'"),
    "yarn, older": (dict(rope_parameters=None, rope_scaling=dict(type="yarn")), "rope type 'yarn'"),
    "another activation": (dict(hidden_act="gelu"), "activation 'gelu'"),
    "no BOS": (dict(bos_token_id=None), "bos_token_id is None"),
    "no EOS": (dict(eos_token_id=None), r"eos_token_id .* is \[\]; expected ids"),
    "a text as EOS": (dict(eos_token_id="</s>"), r"eos_token_id .* is \['</s>'\]; expected ids"),
    "a fraction as EOS": (dict(eos_token_id=2.0), r"eos_token_id .* is \[2.0\]; expected ids"),
    "a truth value as BOS": (dict(bos_token_id=True), "bos_token_id is True"),
    "a text as a size": (dict(vocab_size="97"), "vocab_size is '97', expected a positive number"),
    "a text as a cap": (dict(final_logit_softcapping="30"), "final_logit_softcapping is '30'"),
    "a cap of 0": (dict(attn_logit_softcapping=0), "attn_logit_softcapping is 0, expected a pos"),
    "a huge size": (dict(vocab_size=10 ** 18), "vocab_size is 1000000000000000000, expected a pos"),
    "infinity": (dict(rope_parameters=None, rope_theta=float("inf")), "rope_theta is inf"),
    "rope without a type": (dict(rope_parameters=None, rope_scaling=dict(factor=4.0)),
                            "rope type 'unknown'"),
    "a text as a factor": (dict(rope_parameters=None, rope_scaling=dict(
        rope_type="llama3", factor="8", low_freq_factor=1, high_freq_factor=4,
        original_max_position_embeddings=32)), "factor is '8', expected a positive number"),
    "heads that do not divide": (dict(num_key_value_heads=3), "3 key/value heads of size 16: exp"),
    "an odd head": (dict(head_dim=7), "key/value heads of size 7: expected a multiple"),
    "too many layers": (dict(num_hidden_layers=10 ** 9), "num_hidden_layers is 1000000000"),
    "EOS beyond the vocabulary": (dict(eos_token_id=[2, 97]), r"eos_token_id .* is \[2, 97\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_of_another_computation_is_refused_by_its_key(family, tmp_path, case):
    entries, message = BAD_CONFIGS[case]
    folder = variant(family("llama2"), tmp_path / "model", **entries)
    os.remove(os.path.join(folder, "generation_config.json"))
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        load(folder)


def test_a_folder_config_or_key_that_is_missing_is_named(family, tmp_path):
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        with pytest.raises(InputError, match=f"config.json.*'{key}' is missing"):
            load(variant(family("llama2"), tmp_path / key, without=(key,)))
    (tmp_path / "hidden_size" / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        load(str(tmp_path / "hidden_size"))
    with pytest.raises(InputError, match="nowhere: no config.json; no such folder.*hf download"):
        load(str(tmp_path / "nowhere"))
    run = Path(variant(family("llama2"), tmp_path / "run" / "model")).parent
    with pytest.raises(InputError, match="run: no config.json; did you mean .*run/model"):
        load(str(run))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="no config.json; it is a LoRA adapter"):
        load(str(tmp_path))
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match="it is a hub cache; give one of the folders in .*snap"):
        load(str(tmp_path / "cache"))
    (tmp_path / "cache" / "snapshots").rename(tmp_path / "cache" / "state.json")
    with pytest.raises(InputError, match="it is a checkpoint; resume its run"):
        load(str(tmp_path / "cache"))


STRANGE = {
    "a folder": (lambda path: path.mkdir(), "expected a regular file .*found a folder"),
    "a pipe": (os.mkfifo, "expected a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "found /dev/zero"),
    "a link out": (lambda path: path.symlink_to(__file__), "expected a regular file in this"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "expected a regular file"),
    "a git-lfs pointer": (lambda path: path.write_bytes(LFS), "a git-lfs pointer; run git lfs"),
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model", "chat_template.jinja"])
@pytest.mark.parametrize("case", STRANGE)
def test_only_regular_files_of_the_folder_itself_are_read(family, tmp_path, case, file):
    make, message = STRANGE[case]
    folder = variant(family("llama2"), tmp_path / "model")
    path = Path(folder, file)
    path.unlink(missing_ok=True)
    make(path)
    if case == "a broken link" and file == "config.json":
        message = "no config.json"
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_weight_file_that_is_a_pipe_is_refused(family, tmp_path):
    folder = variant(family("llama2"), tmp_path / "model")
    os.mkfifo(os.path.join(folder, "more.safetensors"))
    with pytest.raises(InputError, match="more.safetensors: not a safetensors file"):
        load(folder)


def test_links_within_a_hub_cache_are_followed(family, tmp_path):
    variant(family("llama2"), tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "a1b2"
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert torch.equal(load(str(snapshot)).head_weight, load(family("llama2")).head_weight)


@pytest.mark.parametrize("text", ["[" * 100_000, "7", "{"])
def test_a_small_file_that_is_no_json_object_is_refused(family, tmp_path, text):
    folder = variant(family("llama2"), tmp_path / "model")
    Path(folder, "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer_config.json: not valid JSON, expected an obj"):
        save(load(folder), str(tmp_path / "out"), chat_template="a template")


def test_a_model_is_saved_whole_after_its_folder_is_gone(family, tmp_path):
    """Half a surrogate pair, which has no UTF-8 form, is kept as it is."""
    folder = variant(family("llama2"), tmp_path / "model", note="\ud800")
    Path(folder, "tokenizer.model").write_bytes(b"tokenizer")
    model = load(folder)
    shutil.rmtree(folder)
    save(model, str(tmp_path / "out"), chat_template="a template")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokenizer"
    assert load(str(tmp_path / "out")).config.raw["note"] == "\ud800"
