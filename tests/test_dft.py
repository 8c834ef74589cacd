"""dft.py: the method against plain passes of transformers, in losses and gradients; the fused
cross-entropy; the lens and the choice of layers.

    python -m pytest tests/test_dft.py
"""
import pytest
import torch
import torch.nn.functional as F
from conftest import EPS, assert_close, hf_model
from reference import cap, losses, norm, states

import dft
from data import Record
from dft import DFT, Method, choose_layers, cross_entropy, lay_out, lens
from model import InputError, Packed, load

LENGTHS = [     # prompt, answer, query_en, answer_en, prompt_en; the fourth has no English side
    (7, 5, 4, 6, 8), (9, 1, 1, 1, 3), (4, 8, 6, 3, 5), (5, 6, None, None, None), (12, 3, 9, 10, 11)]


def make_records(seed=0, lengths=LENGTHS):
    """Records of random ids. Queries begin after a template and end before its end."""
    generator, records = torch.Generator().manual_seed(seed), []
    for one in lengths:
        prompt, answer, query_en, answer_en, prompt_en = [
            n and torch.randint(3, 97, (n,), generator=generator).tolist() for n in one]
        records.append(Record(prompt, answer, (2, one[0] - 1), query_en, answer_en, prompt_en,
                              prompt_en_query=(1, (one[4] or 1) - 1)))
    return records


@pytest.fixture(scope="module")
def models(family):
    """{family: (transformers' model, our model of the same weights)}"""
    names = ("llama3", "smollm2", "gemma2-mild")
    return {name: (hf_model(family(name)), load(family(name))) for name in names}


def ours(model, records):
    """{term: (sum, count)} of records in one pass of a DFT."""
    batch = lay_out(records, model.method, model.model.config.num_hidden_layers)
    return {term: (value, batch.counts[term]) for term, value in model(batch).items()}


def objective(sums):
    """Every loss divided by its own count, and added up."""
    return sum(value / max(count, 1) for value, count in sums.values())


def gradients(model, loss):
    """{name: gradient} of the parameters that have one."""
    model.zero_grad()
    loss.backward()
    named = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def assert_same(model, sums, other_model, other_sums):
    """Equal losses, counts and gradients."""
    assert sums.keys() == other_sums.keys()
    for term, (value, count) in other_sums.items():
        assert_close(sums[term][0], value, term)
        assert sums[term][1] == count
    found = gradients(model, objective(sums))
    expected = gradients(other_model, objective(other_sums))
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], name)


# -------------------------------------------------------------------------------------- the method

SIGNALS = ("none", "logits", "feature")


@pytest.mark.parametrize("name", ("llama3", "smollm2", "gemma2-mild"))
@pytest.mark.parametrize("lc", SIGNALS)
@pytest.mark.parametrize("et", SIGNALS)
def test_one_pass_equals_separate_passes_of_transformers(models, name, lc, et):
    hf, method, records = models[name][0], Method(lc, et, 1, 3), make_records()
    model = DFT(models[name][1], method)
    assert_same(model, ours(model, records), hf, losses(hf, records, method))


SWITCHES = [dict(align="position"), dict(pool="last"), dict(lens_norm=False),
            dict(english_grad=True), dict(lc_layer=2, et_layer=2), dict(lc_layer=4, et_layer=4)]


@pytest.mark.parametrize("signal", ("logits", "feature"))
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_does_what_the_separate_passes_do(models, signal, switch):
    hf, records = models["llama3"][0], make_records(1)
    method = Method(**{**dict(lc=signal, et=signal, lc_layer=1, et_layer=3), **switch})
    model = DFT(models["llama3"][1], method)
    assert_same(model, ours(model, records), hf, losses(hf, records, method))


@pytest.mark.parametrize("name", ("llama3", "smollm2", "gemma2-mild"))
@pytest.mark.parametrize("signal", ("logits", "feature"))
@pytest.mark.parametrize("term", ("lc", "et"))
def test_an_inner_loss_trains_no_layer_above_its_own_nor_norm_and_head(models, term, signal, name):
    method = Method(**{"lc": "none", "et": "none", term: signal}, lc_layer=2, et_layer=2)
    model = DFT(models[name][1], method)
    found = gradients(model, ours(model, make_records())[term][0])
    for key, _ in model.model.named_parameters():
        trained = key in found and found[key].any()
        above = key.startswith(("layers.2", "layers.3", "norm", "lm_head"))     # 0 and 1 are below
        assert trained != above, key


def test_a_tied_embedding_learns_from_an_inner_loss_as_input_only(models):
    """Rows of ids that are predicted, but not read, have no gradient: W_out is frozen."""
    model = DFT(models["smollm2"][1], Method("logits", "none", 2, 2))
    record = Record([1, 5, 6], [7], (1, 3), query_en=[8, 9], answer_en=[10, 11])
    found = gradients(model, ours(model, [record])["lc"][0])["embed_tokens.weight"]
    # 9 is the last token of the query and predicts nothing; 7 is in another segment.
    assert found.any(dim=1).nonzero()[:, 0].tolist() == [1, 5, 6, 8]


def test_the_example_of_the_first_page_is_laid_out_as_drawn():
    country, currency_zh, euro_zh, eos, euro, the, currency, mark = range(10, 18)
    record = Record([country, currency_zh], [euro_zh, eos], query_en=[the, currency, mark],
                    answer_en=[euro, eos])
    batch = lay_out([record], Method("logits", "logits", 1, 3), L=4)
    packed = batch.packed
    assert packed.ids == [country, currency_zh, euro_zh, eos, euro, eos, the, currency, mark]
    assert packed.position == [0, 1, 2, 3, 2, 3, 2, 3, 4]
    assert packed.depth == [4, 4, 4, 4, 3, 3, 1, 1, 1]
    assert batch.losses == {"tft": [([1, 2], [euro_zh, eos])], "et": [([1, 4], [euro, eos])],
                            "lc": [([1, 6, 7], [the, currency, mark])]}
    assert batch.counts == {"tft": 2, "et": 2, "lc": 3} and batch.tokens == 9


@pytest.mark.parametrize("signal", ("logits", "feature"))
@pytest.mark.parametrize("records", ([Record([1, 5], [6, 7])], [Record([1], [])]))
def test_a_loss_of_no_tokens_or_pairs_is_a_differentiable_zero(models, signal, records):
    """FSDP needs a backward pass on every rank, whatever its records are."""
    model = DFT(models["llama3"][1], Method(signal, signal, 1, 3))
    sums = ours(model, records)
    for term in ("lc", "et"):
        assert sums[term][0] == 0 and sums[term][0].requires_grad and sums[term][1] == 0
    assert sums["tft"][1] == len(records[0].answer)
    assert all(grad.isfinite().all() for grad in gradients(model, objective(sums)).values())


def test_language_conversion_must_not_end_above_english_thinking():
    with pytest.raises(InputError, match="lc_layer 3 is above et_layer 2"):
        Method("logits", "logits", 3, 2)
    Method("logits", "none", 3, 2)


# ------------------------------------------------------------------------- the fused cross-entropy

def dense(x, weight, target, limit):
    logits = (x @ weight.T).float()
    logits = limit * torch.tanh(logits / limit) if limit else logits
    return F.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("n", (0, 1, 64))
@pytest.mark.parametrize("limit", (None, 30.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_cross_entropy_equals_the_dense_one(dtype, limit, n, compiled, monkeypatch):
    """In value and gradients, with logits beyond the cap. x and W hold small whole numbers, so that
    the logits are exact in both dtypes and sums in another order cannot round to other logits."""
    monkeypatch.setitem(dft.CHUNK, "cpu", 1000)     # 10 tokens of 100 logits: 7 chunks, one shorter
    x = torch.randint(-3, 4, (n, 32)).to(dtype)
    weight, target = torch.randint(-3, 4, (100, 32)).to(dtype), torch.randint(100, (n,))
    assert n == 0 or (x @ weight.T).abs().max() > 30
    nll = torch.compile(dft.nll, dynamic=True) if compiled else dft.nll
    found = []
    for function, more in ((cross_entropy, [nll]), (dense, [])):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(a, b, target, limit, *more)
        (loss * 1.7).backward()
        found.append((loss.detach(), a.grad, b.grad))
    # A gradient is a sum of up to 100 products; in bf16 each of 7 chunks is rounded.
    bound = 100 * EPS if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for mine, theirs in zip(*found):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, bound=bound)


def test_fused_cross_entropy_computes_only_gradients_that_are_needed_and_only_once():
    x, weight, target = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8), torch.arange(4)
    loss = cross_entropy(x, weight, target)
    assert loss.grad_fn.dw is None and loss.grad_fn.dx.shape == x.shape
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):             # instead of scaling the gradient twice
        loss.backward()
    with torch.no_grad():
        assert not cross_entropy(x, weight.requires_grad_(), target).requires_grad


# -------------------------------------------------------------------------------- lens and layers

@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
def test_the_lens_is_norm_and_head_of_transformers_on_every_layer(models, name):
    hf, model = models[name]
    ids, asked = torch.randint(97, (11,)).tolist(), torch.randint(97, (11, 2))
    packed = Packed()
    packed.add([1, 2], depth=4)
    row = packed.add(ids, depth=4)
    entropy, probability = lens(model, packed, list(row), asked)
    assert entropy.shape == (5, 11) and probability.shape == (5, 11, 2)
    for k, h in enumerate(states(hf, ids)):
        p = cap(hf, F.linear(norm(hf, h, "frozen"), hf.lm_head.weight)).softmax(-1)
        assert_close(entropy[k], -(p * p.log()).sum(-1), f"entropy, layer {k}")
        assert_close(probability[k], p.gather(1, asked), f"probability, layer {k}")


def test_i_is_where_the_first_drop_of_the_entropy_ends_and_j_where_the_second_begins():
    entropy = [9.0, 9.0, 5.0] + [5.0] * 13 + [4.0, 3.0, 2.0] + [2.0] * 14       # layers 2 and 16-18
    i, j, why = choose_layers(entropy)
    assert (i, j) == (2, 15) and "2-2" in why and "16-18" in why


@pytest.mark.parametrize("between", ([5.2, 5.1, 5.2, 5.1, 5.2],         # up and down
                                     [4.7, 4.4, 4.1, 3.8, 3.5],         # slowly falling
                                     [5.0, 4.3, 4.3, 4.3, 4.3]))        # one small step
def test_a_small_or_slow_fall_of_the_entropy_is_no_drop(between):
    assert choose_layers([9.0, 9.0, 5.0, *between, 3.0, 2.0, 2.1])[:2] == (2, 7)


@pytest.mark.parametrize("entropy", ([5.0] * 33, [9 - k / 4 for k in range(33)], list(range(33)),
                                     [9.0] * 10 + [2.0] * 23))
def test_without_two_drops_the_layers_are_the_papers_shares_of_the_depth(entropy):
    i, j, why = choose_layers(entropy)
    assert (i, j) == (2, 15) and "2/32 and 15/32" in why
