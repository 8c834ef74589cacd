"""What tests share: tiny random models that transformers wrote, and files that may be missing."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM,  # noqa: E402
                          LlamaConfig, LlamaForCausalLM)
from transformers.utils import logging  # noqa: E402

import runs  # noqa: E402
import train  # noqa: E402
from runs import command, launch, write_data  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)        # like the runs that tests start: equal work gives equal bits
EPS = torch.finfo(torch.float32).eps            # 2^-23, the relative spacing of fp32 numbers


def assert_close(ours, theirs, what="", bound=1000 * EPS):
    """Equal but for rounding: no entry differs by more than `bound` of the largest entry.

    Two orders of adding k numbers of random sign differ by about sqrt(k) EPS of the largest sum. A
    result of our tiny models is a chain of some 30 sums of up to 100 numbers, so about 300 EPS
    where errors add up. A wrong mask, index or factor differs by 0.01 or more, which is 80,000 EPS.
    """
    assert ours.shape == theirs.shape, what
    if ours.numel():
        apart, largest = (ours.float() - theirs.float()).abs().max(), theirs.float().abs().max()
        assert apart <= bound * largest, f"{what}: {apart / largest / EPS:.0f} EPS apart"


def hf_model(folder):
    """The folder as transformers reads it, in fp32 and with the attention scores written out."""
    how = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


TINY = dict(vocab_size=97, num_hidden_layers=4, max_position_embeddings=128)
# The wavelengths are 6.3, 19.9, 62.8 and longer. A first context of 32 keeps those below 32/4,
# stretches those above 32/1 and blends those between.
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    # as many key/value heads as heads, an untied head
    "llama2": LlamaConfig(
        hidden_size=32, intermediate_size=44, num_attention_heads=2, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=False, **TINY),
    # two query heads for a key/value head, stretched wavelengths
    "llama3": LlamaConfig(
        hidden_size=64, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False, **TINY),
    # a tied head, three query heads for a key/value head, heads that do not add up to hidden_size
    "smollm2": LlamaConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2,
        head_dim=12, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0), **TINY),
    # a window shorter than the rows, a scale that follows from no other number
    "gemma2": Gemma2Config(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, query_pre_attn_scalar=24, sliding_window=8,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0), **TINY),
}
# The same without the large weights that make both caps bend, which magnify rounding errors.
FAMILIES["gemma2-mild"] = FAMILIES["gemma2"]


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family("gemma2") -> a folder of random fp32 weights that transformers wrote. Only read it."""
    folders = {}

    def write(name):
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            with torch.random.fork_rng():           # draws nothing from the test's numbers
                random_model(name).save_pretrained(folders[name])
        return folders[name]

    return write


def random_model(name):
    """A transformers model of a family."""
    torch.manual_seed(1)
    model = (Gemma2ForCausalLM if name.startswith("gemma2") else LlamaForCausalLM)(FAMILIES[name])
    for key, p in model.named_parameters():
        if "norm" in key:                   # initialised, all norms are the identity
            p.data.add_(torch.randn_like(p) * 0.2)
        else:                               # large enough that greedy text varies
            p.data.normal_(0, 0.15)
    if name == "gemma2":
        bend_both_caps(model.model)
    return model


def bend_both_caps(model):
    """Enlarge scores and logits to where Gemma-2's caps matter."""
    model.embed_tokens.weight.data.mul_(2)
    model.norm.weight.data.add_(10)
    for layer in model.layers:
        layer.self_attn.q_proj.weight.data.mul_(3.5)
        layer.self_attn.k_proj.weight.data.mul_(3.5)
        # Otherwise the embedding outweighs the layers, and each token repeats itself.
        layer.post_attention_layernorm.weight.data.add_(3)
        layer.post_feedforward_layernorm.weight.data.add_(3)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """Forty parallel records of the demo."""
    return write_data(tmp_path_factory.mktemp("data") / "forty.jsonl", 40)


@pytest.fixture(scope="session")
def shared():
    """The folder of shared material beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the checkout (published tokenizers, stories260K)")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """A SmolLM2-135M folder."""
    folder = os.environ.get("SMOLLM2_DIR")
    if not folder:
        pytest.skip("set SMOLLM2_DIR to a SmolLM2-135M folder")
    return folder


EIGHT = ("--steps", 8, "--batch_size", 5, "--save_every", 4)


@pytest.fixture(scope="session")
def straight(demo_data, tmp_path_factory):
    """Eight undisturbed steps in one process, with checkpoints after steps 4 and 8."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train.main(command(out, demo_data, *EIGHT))
    return out


def rewind(run, copy):
    """A copy of such a run as it was when it died a few steps after its checkpoint at 4."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model", "step-000008"))
    return copy


@pytest.fixture(scope="session")
def two_ranks(straight, demo_data, tmp_path_factory):
    """A folder of runs on two ranks: four steps of each method; the eight steps of `straight`; and
    their last four, resumed from the checkpoint that one process wrote."""
    folder = tmp_path_factory.mktemp("two_ranks")
    commands = [command(folder / "straight", demo_data, *EIGHT),
                command(rewind(straight, folder / "resumed"), demo_data, *EIGHT)]
    for method in ("tft", "dft-logits", "dft-feature"):
        commands.append(command(folder / method, demo_data, "--method", method, "--batch_size", 13,
                                "--epochs", 1))
    launch([json.dumps(commands)], ranks=2, program=runs.__file__)
    return folder
