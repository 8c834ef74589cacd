"""Fast paths equal plain ones in loss and gradient: FlexAttention, torch.compile, kept memory.

    python -m pytest tests/test_fast.py -rs
"""
import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from unittest.mock import Mock

import bench
import pytest
import torch
from conftest import EPS, ROOT, assert_close
from test_dft import assert_same, gradients, make_records, objective, ours
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

import train
from dft import DFT, Method, chunk_rows
from model import Config, Packed, attention_inputs, load


@pytest.mark.parametrize("window", (None, 8))
@pytest.mark.parametrize("layer", (1, 2, 3))
def test_block_masks_hold_the_rule_and_every_block_that_it_needs(family, layer, window):
    packed, config = Packed(), Config.read(family("gemma2"))
    for lengths in torch.randint(0, 90, (9, 4)).tolist():
        prompt = packed.add([5] * (lengths[0] + 1), depth=3)
        for depth in (3, 2, 1):
            packed.add([6] * lengths[depth], depth, after=prompt)
    mask = attention_inputs(packed, layer, config, "cpu", flex=True).masks[window][0]
    tokens = [t for t in range(len(packed)) if packed.depth[t] >= layer]
    n, size = len(tokens), mask.shape[-1]
    assert size == 1 << (n - 1).bit_length() > 256          # several blocks, padded
    seen = mask.mask_mod(0, 0, torch.arange(size)[:, None], torch.arange(size)[None, :])
    for a, line in zip(tokens, seen[:n, :n].tolist()):      # the rule in words, for each pair
        for b, sees in zip(tokens, line):
            text = packed.segment[b] in (0, packed.segment[a])      # the prompt or its own segment
            near = window is None or packed.position[a] - packed.position[b] < window
            assert sees == (packed.row[a] == packed.row[b] and b <= a and text and near), (a, b)
    assert torch.equal(seen[n:], torch.eye(size, dtype=torch.bool)[n:])     # else NaN in padding
    computed = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (seen & ~computed).any() and computed.float().mean() < 0.5


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("signal", ("logits", "feature"))
def test_flex_attention_equals_attention_row_by_row(family, signal, name, checkpointing,
                                                    monkeypatch):
    """Traced as on a GPU, but without kernels: CPUs have none for its backward pass, which
    flex_attention checks at each call. (Without a trace, checkpointing gives wrong gradients.)"""
    check = Mock()
    monkeypatch.setattr(flex, "_validate_device", check)
    method, records = Method(signal, signal, 1, 3), make_records()
    plain, fast = DFT(load(family(name)), method), DFT(load(family(name)), method)
    fast.model.flex = True
    torch._dynamo.reset()                                   # graphs count up to a limit
    traced = torch.compile(flex.flex_attention, backend="aot_eager", dynamic=False)
    for layer in fast.model.layers:
        layer.self_attn.flex_attention, layer.checkpointing = traced, checkpointing
    records[0].prompt *= 20                                 # more than one block
    assert_same(fast, ours(fast, records), plain, ours(plain, records))
    assert check.call_count >= 1


@pytest.mark.parametrize("name, with_flex", [("llama3", False), ("gemma2-mild", True)])
def test_compiled_parts_equal_plain_ones_and_are_not_recompiled(family, name, with_flex):
    """With FlexAttention only the forward pass, as CPUs cannot compile the backward pass."""
    folder, method = family(name), Method("logits", "logits", 1, 3)
    args = train.parse(["--model", folder, "--data", "-", "--dtype", "fp32", "--compile", "yes"])
    plain = DFT(load(folder), method)
    fast = train.build(Config.read(folder), method, args, train.Ranks(torch.device("cpu")))
    if with_flex:
        fast.compile_parts(flex=True)
        for layer in (*plain.model.layers, *fast.model.layers):
            layer.self_attn.window = 8                      # one kind of layer compiles faster
    graphs, before = [], counters["stats"]["unique_graphs"]
    for rows in (2, 3, 4):
        records = make_records(rows, [(7 + r, 5 + rows, 4 + r, 6, 8) for r in range(rows)])
        with torch.set_grad_enabled(not with_flex):
            sums, expected = ours(fast, records), ours(plain, records)
        if with_flex:
            assert_close(objective(sums), objective(expected))
        else:
            assert_same(fast, sums, plain, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert before + 3 <= graphs[0] == graphs[1] == graphs[2]       # a layer in two parts; the loss


@pytest.mark.parametrize("method", ("tft", "dft-logits", "dft-feature"))
def test_the_benchmark_and_its_peer_compute_equal_losses(method, demo_data):
    args = Namespace(model=str(ROOT / "demo" / "model"), data=demo_data, method=method, lc_layer=1,
                     et_layer=3, dtype="fp32", records=6, device="cpu", micro_batch_tokens=200,
                     compile="no")
    *_, records = given = bench.prepare(args)
    losses = []
    for model, compute in (bench.ours(*given), bench.peer(*given, batch=4)):
        losses.append({term: mean.item() for term, mean in compute(records).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1000 * EPS)


def test_a_chunk_of_logits_is_whole_tiles_on_a_gpu():
    assert [chunk_rows(V, "cuda") for V in (32000, 256000, 10 ** 7)] == [4096, 512, 128]
    assert [chunk_rows(V, "cpu") for V in (32000, 256000, 10 ** 8)] == [1048, 131, 1]


def test_the_script_for_a_gpu_runs_every_part_on_a_cpu(tmp_path):
    parts = "tests,losses:gemma2-mild,recompilations,resume,demo,speed,decoding"
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu.py", "--device", "cpu", "--tiny",
                           "--parts", parts, "--out", tmp_path / "gpu.json"], capture_output=True,
                          text=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert Counter(part for part, *_ in rows) == {
        "tests": 2, "losses:gemma2-mild": 7, "recompilations": 4, "resume": 2, "demo": 6,
        "speed": 6, "decoding": 2}, done.stderr
    assert done.returncode == 0 and "FAILED" not in done.stdout


RESIDENT = """
import resource, torch, model, train

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2 ** 20      # MiB
"""
FREED = RESIDENT + """
def growth():
    before = resident()
    torch.ones(2 ** 24)     # 64 MiB, freed at once
    return resident() - before

print(growth())
train.start(train.parse(["--device", "cpu"]))
print(growth())
"""
LENGTHS = RESIDENT + """
model.pick_device("cpu")
layer = model.Linear(512, 512)
for length in range(300, 600):
    layer(torch.ones(length, 512, dtype=torch.bfloat16)).sum().backward()
    if length == 340:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
def test_memory_that_a_step_freed_is_kept_by_the_process():
    """The process grows by a freed block of 64 MiB after train.start(), and not before it."""
    out = subprocess.check_output([sys.executable, "-c", FREED], cwd=ROOT, text=True)
    returned, kept = out.split()
    assert float(returned) < 32 < float(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_in_bf16_does_not_grow_with_every_new_length():
    """With oneDNN's default caches it grew by more than 400 MiB."""
    out = subprocess.check_output([sys.executable, "-c", LENGTHS], cwd=ROOT, text=True)
    assert float(out) < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: compiled FlexAttention")
@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
@pytest.mark.parametrize("signal", ("logits", "feature"))
def test_on_a_gpu_compiled_bf16_is_near_plain_fp32_and_is_not_recompiled(family, signal, name):
    graphs, method = [], Method(signal, signal, 1, 3)
    plain, fast = DFT(load(family(name)), method), DFT(load(family(name), device="cuda"), method)
    fast.model.compute_dtype = torch.bfloat16
    fast.compile_parts(flex=True)
    for rows in (5, 7, 6, 7):           # with 7, all powers of two that will be needed are compiled
        records = make_records(rows, [(40 + r, 25 + rows, 24 + r, 26, 28) for r in range(rows)])
        losses, flat = [], []
        for model in (plain, fast):
            losses.append(objective(ours(model, records)))
            found = gradients(model, losses[-1])
            flat.append(torch.cat([found[key].float().cpu().flatten() for key in sorted(found)]))
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)    # bf16: 2^-8 a step
        assert torch.cosine_similarity(*flat, dim=0) > 0.99
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]
