"""Fast paths equal plain ones in loss and gradient: FlexAttention, torch.compile, kept memory.

    python -m pytest tests/test_fast.py -rs
"""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_close
from test_dft import assert_same, gradients, make_records, objective, ours
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import train
from dft import DFT, Method, lay_out
from model import Config, Packed, block_mask, load

DEMO = str(ROOT / "demo" / "model")


@pytest.mark.parametrize("window", (None, 20))
@pytest.mark.parametrize("layer", (1, 2, 3))
def test_block_masks_hold_the_rule_and_every_block_that_it_needs(layer, window):
    packed = Packed()
    for lengths in torch.randint(0, 90, (9, 4)).tolist():
        prompt = packed.add([5] * (lengths[0] + 1), depth=3)
        for depth in (3, 2, 1):
            packed.add([6] * lengths[depth], depth, after=prompt)
    kept = torch.tensor(packed.depth) >= layer
    fields = torch.tensor([packed.position, packed.row, packed.segment])[:, kept]
    n, mask = fields.shape[1], block_mask(*fields, window, "cpu")
    size = mask.shape[-1]
    assert size == 1 << (n - 1).bit_length() > 256          # several blocks, padded
    index = torch.arange(size)
    seen = mask.mask_mod(0, 0, index[:, None], index[None, :])
    position, row, segment = fields.tolist()
    for a, line in enumerate(seen[:n, :n].tolist()):        # the rule in words, for each pair
        for b, sees in enumerate(line):
            near = window is None or position[a] - position[b] < window
            text = segment[b] in (0, segment[a])            # the prompt or the own segment
            assert sees == (row[a] == row[b] and b <= a and text and near), (a, b)
    padding = torch.eye(size, dtype=torch.bool)[n:]         # sees itself only, so no NaN arises
    assert torch.equal(seen[n:], padding) and not seen[:n, n:].any()
    computed = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (seen & ~computed).any() and computed.float().mean() < 0.5


@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("signal", ("logits", "feature"))
def test_flex_attention_equals_attention_row_by_row(family, signal, name, monkeypatch):
    """Uncompiled, since CPUs cannot compile its backward pass, and without the check against that."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    method, records = Method(signal, signal, 1, 3), make_records()
    plain, fast = DFT(load(family(name)), method), DFT(load(family(name)), method)
    fast.model.flex = True
    records[0].prompt *= 20                                 # more than one block
    assert_same(fast, ours(fast, records), plain, ours(plain, records))


def test_compiled_flex_attention_equals_the_plain_one_and_is_not_recompiled(family):
    """The forward pass, which CPUs can compile."""
    method = Method("logits", "none", 2, 2)
    plain, fast = DFT(load(family("gemma2-mild")), method), DFT(load(family("gemma2-mild")), method)
    for layer in (*plain.model.layers, *fast.model.layers):
        layer.self_attn.window = 8                          # one kind of layer compiles faster
    fast.compile_parts(flex=True)
    graphs = []
    for rows in (2, 3, 5):
        records = make_records(rows, [(7 + row, 5 + rows, 4 + row, 6, 8) for row in range(rows)])
        with torch.no_grad():
            sums, expected = ours(fast, records), ours(plain, records)
        for term in expected:
            assert_close(sums[term][0], expected[term][0], term)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_compiled_layers_and_loss_equal_plain_ones_and_are_not_recompiled(demo_data):
    args = train.parse(["--model", DEMO, "--data", demo_data, "--device", "cpu", "--dtype", "fp32"])
    models, graphs, before = [], [], counters["stats"]["unique_graphs"]
    for args.compile in ("no", "yes"):
        models.append(train.build(Config.read(DEMO), Method("logits", "logits", 1, 3), args,
                                  train.Ranks(torch.device("cpu"))))
    plain, fast = models
    for rows in (9, 4, 13):
        records = make_records(rows, [(30 + row, 25, 24, 26, 28) for row in range(rows)])
        assert_same(fast, ours(fast, records), plain, ours(plain, records))
        graphs.append(counters["stats"]["unique_graphs"])
    assert before + 3 <= graphs[0] == graphs[1] == graphs[2]       # a layer in two parts; the loss


COUNT_PAGES = """
import resource, sys, torch, train
if sys.argv[1] == "keep":
    train.start(train.parse(["--device", "cpu"]))
torch.ones(2 ** 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2 ** 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
def test_memory_that_a_step_freed_is_used_again():
    """Ten blocks of 64 MiB in turn take their pages from the system once, not ten times."""
    pages = {}
    for how in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", COUNT_PAGES, how], check=True, cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
        pages[how] = int(done.stdout)
    assert pages["keep"] < pages["return"] / 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: compiled FlexAttention")
@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("signal", ("logits", "feature"))
def test_on_a_gpu_compiled_bf16_is_near_plain_fp32_and_is_not_recompiled(family, signal, name):
    method, graphs = Method(signal, signal, 1, 3), []
    plain = DFT(load(family(name)), method)
    fast = DFT(load(family(name), device="cuda"), method)
    fast.model.compute_dtype = torch.bfloat16
    fast.compile_parts(flex=True)
    for rows in (5, 7, 6, 7):           # with 7, all powers of two that will be needed are compiled
        lengths = [(40 + row, 25 + rows, 24 + row, 26, 28) for row in range(rows)]
        losses, flat = [], []
        for model in (plain, fast):
            loss = objective(ours(model, make_records(rows, lengths)))
            losses.append(loss.item())
            found = gradients(model, loss)
            flat.append(torch.cat([found[key].float().cpu().flatten() for key in sorted(found)]))
        assert losses[1] == pytest.approx(losses[0], rel=2e-2)
        assert torch.cosine_similarity(*flat, dim=0) > 0.99
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]
