"""Every fast path beside a plain one gives the same loss and the same gradient: FlexAttention and strands,
compiled and not, kept memory and not. What needs a GPU skips aloud without one."""
import subprocess
import sys

import pytest
import torch
from runs import DEMO, ROOT
from test_dft import gradients, ours, records, same_gradients, total
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import dft
import train
from data import Tokenizer, make_records, read_parallel
from dft import Method, lay_out
from model import Config, Tokens, block_mask, load


def ragged(rows=9):
    """Rows of a trunk and three branches, some of no tokens, which leave after layers 3, 2 and 1."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 90, (rows, 4), generator=g).tolist()
    return Tokens([[([5] * (p + 1), 3), ([6] * a, 3), ([7] * y, 2), ([8] * x, 1)] for p, a, y, x in sizes])


@pytest.mark.parametrize("window", (None, 20))
@pytest.mark.parametrize("layer", (1, 2, 3))
def test_block_masks_let_see_what_the_rule_says_and_leave_no_needed_block_out(layer, window):
    t = ragged()
    pos, row, seg = (x[t.depth >= layer] for x in (t.pos, t.row, t.seg))
    mask, n = block_mask(pos, row, seg, window, "cpu"), len(pos)
    size = mask.shape[-1]
    assert size == 1 << (n - 1).bit_length() and n > 128, "several blocks, padded to a power of two"
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    seen, (pos, row, seg) = mask.mask_mod(0, 0, q, k), (x.tolist() for x in (pos, row, seg))
    for a, line in enumerate(seen[:n, :n].tolist()):        # one by one, in words
        for b, sees in enumerate(line):
            own = seg[b] in (0, seg[a]) and b <= a          # the trunk, or the own branch, and nothing later
            near = window is None or pos[a] - pos[b] < window
            assert sees == (row[a] == row[b] and own and near), (a, b)
    assert torch.equal(seen[n:], torch.eye(size, dtype=torch.bool)[n:]) and not seen[:n, n:].any(), "padding"
    computed = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (seen & ~computed).any()
    assert computed.float().mean() < 0.5, "rows far apart are not compared"


@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("kind", ("logits", "feature"))
def test_flex_attention_equals_strands_in_loss_and_gradient(family, kind, name, monkeypatch):
    """On CPUs FlexAttention has a backward only uncompiled, behind a check that is put aside here."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    model, method, recs = load(family(name)), Method(kind, kind, 1, 3), records()
    recs[0].prompt *= 20                                    # more than a block
    plain = ours(model, recs, method)
    expected = gradients(model, total(plain))
    model.flex, calls = True, []
    for layer in model.layers:
        layer.self_attn.flex_attention = lambda *a, **more: calls.append(1) or flex.flex_attention(*a, **more)
    fast = ours(model, recs, method)
    assert len(calls) >= 4, "every layer went that way"
    for term in plain:
        torch.testing.assert_close(fast[term][0], plain[term][0], rtol=1e-5, atol=1e-5)
    same_gradients(gradients(model, total(fast)), expected)


def test_compiled_flex_attention_equals_strands_and_is_not_compiled_anew_for_every_size(family):
    """As far as a CPU goes, which compiles its forward pass alone."""
    plain, fast = load(family("gemma2-mild")), load(family("gemma2-mild"))
    for layer in (*plain.layers, *fast.layers):
        layer.self_attn.window = 8                          # one kind of layer: half the time to compile
    fast.compile_layers(flex=True)
    graphs = []
    with torch.no_grad():
        for rows in (2, 3, 5):
            recs = records(rows, shapes=[(7 + r, 5 + rows, 4 + r, 6, 8) for r in range(rows)])
            batch = lay_out(recs, Method("logits", "none", 2, 2), 4)
            a, b = (model(batch.tokens, (2, 4)) for model in (plain, fast))
            for k in a:
                torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-4)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_compiled_layers_and_loss_equal_plain_ones_and_are_not_compiled_anew_for_every_size(demo_data):
    a = train.settings(["--model", DEMO, "--data", demo_data, "--device", "cpu", "--dtype", "fp32"])
    config, method = Config.read(DEMO), Method("logits", "logits", 1, 3)
    ranks = train.Ranks(torch.device("cpu"))
    recs = make_records(read_parallel(demo_data), Tokenizer(config), "both", 512)[0]
    models, graphs, before = [], [], counters["stats"]["unique_graphs"]
    for a.compile in ("auto", "yes"):
        models.append(train.build(config, method, a, ranks))
    for part in (recs[:9], recs[9:13], recs[13:30]):
        found = []
        for model in models:
            batch = lay_out(part, method, config.num_layers)
            sums = model(batch)
            found.append((sums, gradients(model, sum(s / batch.counts[t] for t, s in sums.items()))))
        (plain, expected), (fast, got) = found
        for term in plain:
            torch.testing.assert_close(fast[term], plain[term], rtol=1e-5, atol=1e-5)
        same_gradients(got, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert before + 3 <= graphs[0] == graphs[1] == graphs[2], "a layer in two parts, and the loss"


@pytest.mark.parametrize("limit", (None, 30.0))
def test_a_compiled_score_equals_the_plain_one(limit):
    logits, targets = 20 * torch.randn(33, 100), torch.randint(100, (33, 1))
    for c in (33, 12):
        for mine, theirs in zip(torch.compile(dft.score, dynamic=True)(logits[:c], targets[:c], limit, True),
                                dft.score(logits[:c], targets[:c], limit, True)):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_memory_that_a_step_has_freed_is_not_taken_from_the_system_anew():
    """Blocks of 64 MiB, ten times: the pages of the first one serve nearly all, though something small may
    come to lie in its place. Linux with glibc."""
    count = ("import resource, sys, torch, train\n"
             "if sys.argv[1:]: train.start(train.settings(['--device', 'cpu']))\n"
             "torch.ones(2 ** 24)\n"
             "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
             "for _ in range(10): torch.ones(2 ** 24)\n"
             "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    kept, given_back = (int(subprocess.run([sys.executable, "-c", count, *more], cwd=ROOT, check=True,
                                           stdout=subprocess.PIPE, text=True).stdout) for more in (["x"], []))
    if given_back < 1000:
        pytest.skip("this C library keeps freed memory anyway")
    assert kept < given_back / 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for compiled FlexAttention's backward")
@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("kind", ("logits", "feature"))
def test_on_a_gpu_compiled_bf16_is_near_plain_fp32_and_is_not_compiled_anew(family, kind, name):
    method, graphs = Method(kind, kind, 1, 3), []
    plain = dft.DFT(load(family(name)), method)
    fast = dft.DFT(load(family(name), device="cuda"), method)
    fast.model.compute_dtype = torch.bfloat16
    fast.compile_parts(flex=True)
    for rows in (5, 7, 6, 8):
        batch = lay_out(records(rows, [(40 + r, 25 + rows, 24 + r, 26, 28) for r in range(rows)]), method, 4)
        found = []
        for model in (plain, fast):
            loss = sum(value / batch.counts[term] for term, value in model(batch).items())
            found.append((loss, gradients(model, loss)))
        (loss, want), (near, got) = found
        assert near.item() == pytest.approx(loss.item(), rel=2e-2)
        a, b = (torch.cat([g[key].float().cpu().flatten() for key in sorted(want)]) for g in (want, got))
        assert torch.cosine_similarity(a, b, dim=0) > 0.99
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]
