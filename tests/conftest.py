"""What the tests share: tiny random folders that transformers wrote, and material that may be absent."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()

torch.set_num_threads(1)        # as the runs that tests start have: then equal work gives equal bits

TINY = dict(vocab_size=97, num_hidden_layers=4, max_position_embeddings=128)
FAMILIES = {
    # as many key/value heads as heads, an untied head
    "llama2": LlamaConfig(hidden_size=32, intermediate_size=44, num_attention_heads=4, num_key_value_heads=4,
                          rms_norm_eps=1e-5, tie_word_embeddings=False, **TINY),
    # Wavelengths are 6.3, 19.9, 62.8 and longer; a first context of 32 keeps those below 32/4, blends those
    # up to 32/1 and stretches the rest.
    "llama3": LlamaConfig(hidden_size=64, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
                          rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0,
                                               low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=32),
                          tie_word_embeddings=False, **TINY),
    # a tied head, three queries to a key, heads that do not add up to the hidden size
    "smollm2": LlamaConfig(hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2,
                           head_dim=12, tie_word_embeddings=True,
                           rope_parameters=dict(rope_type="default", rope_theta=100000.0), **TINY),
    # a window shorter than the rows, a scale that follows from no other number
    "gemma2": Gemma2Config(hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                           head_dim=16, query_pre_attn_scalar=24, sliding_window=8,
                           rope_parameters=dict(rope_type="default", rope_theta=5000.0), **TINY),
}
FAMILIES["gemma2-mild"] = FAMILIES["gemma2"]    # weights that fp32 gradients bear to five digits


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family("gemma2") -> a folder that transformers wrote, of random fp32 weights. Leave it as it is."""
    folders = {}

    def write(name):
        if name not in folders:
            config = FAMILIES[name]
            torch.manual_seed(1)
            model = (Gemma2ForCausalLM if name.startswith("gemma2") else LlamaForCausalLM)(config)
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if "norm" in key:                       # as initialised, all norms are the identity
                        p.add_(torch.randn_like(p) * 0.2)
                    else:                                   # large enough that greedy text varies
                        p.normal_(0, 0.15)
                if name == "gemma2":                        # where both caps bend
                    model.model.embed_tokens.weight.mul_(2)
                    model.model.norm.weight.add_(10)
                    for layer in model.model.layers:
                        layer.self_attn.q_proj.weight.mul_(3.5)
                        layer.self_attn.k_proj.weight.mul_(3.5)
                        # so that the embedding does not outweigh the layers, and each token repeat itself
                        layer.post_attention_layernorm.weight.add_(3)
                        layer.post_feedforward_layernorm.weight.add_(3)
            folders[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(folders[name])
        return folders[name]

    return write


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """Forty parallel records of the demo."""
    path = tmp_path_factory.mktemp("data") / "forty.jsonl"
    lines = (ROOT / "demo" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:40]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def shared():
    """The folder of shared material beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the checkout, which has published tokenizers and stories260K")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """A SmolLM2-135M folder."""
    folder = os.environ.get("SMOLLM2_DIR")
    if not folder:
        pytest.skip("set SMOLLM2_DIR to a SmolLM2-135M folder (config, safetensors, tokenizer.json)")
    return folder
