"""The method against plain forward passes of transformers, its gradients, the fused cross-entropy, the layer
choice."""
import pytest
import torch
import torch.nn.functional as F
from reference import losses, normed, states
from transformers import AutoModelForCausalLM

import dft
from data import Record
from dft import DFT, Method, choose_layers, cross_entropy, lay_out, lens
from model import Tokens, load

RAGGED = [  # prompt, answer, query_en, answer_en, prompt_en: lengths differ; the fourth is English-only
    (7, 5, 4, 6, 8), (9, 1, 1, 1, 3), (4, 8, 6, 3, 5), (5, 6, None, None, None), (12, 3, 9, 10, 11)]


def records(seed=0, shapes=RAGGED):
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return None if n is None else torch.randint(3, 97, (n,), generator=g).tolist()
    return [Record(ids(p), ids(a), ids(x), ids(y), ids(e), query=(2, p - 1)) for p, a, x, y, e in shapes]


@pytest.fixture(scope="module")
def pairs(family):
    """{family: (transformers' model, our model of the same weights)}"""
    how = dict(dtype=torch.float32, attn_implementation="eager")
    return {name: (AutoModelForCausalLM.from_pretrained(family(name), **how), load(family(name)))
            for name in ("llama3", "smollm2", "gemma2-mild")}


def total(sums):
    """The objective with every term divided by its own count."""
    return sum(value / max(count, 1) for value, count in sums.values())


def ours(model, recs, method):
    batch = lay_out(recs, method, model.config.num_layers)
    sums = DFT(model, method)(batch)
    return {term: (sums[term], batch.counts[term]) for term in sums}


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {n.removeprefix("model."): p.grad for n, p in module.named_parameters() if p.grad is not None}


def same_gradients(got, expected):
    """Within 1e-5 of the whole gradient's length, tensor by tensor."""
    assert got.keys() == expected.keys()
    length = sum(g.norm() ** 2 for g in expected.values()) ** 0.5
    for key in expected:
        assert (got[key] - expected[key]).norm() <= 1e-5 * length, key


ARMS = [(lc, et) for lc in ("none", "logits", "feature") for et in ("none", "logits", "feature")]


@pytest.mark.parametrize("name", ("llama3", "smollm2", "gemma2-mild"))
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_equals_plain_passes_of_transformers_in_loss_and_gradient(pairs, name, arm):
    hf, model = pairs[name]
    method, recs = Method(*arm, 1, 3), records()
    reference, own = losses(hf, recs, method), ours(model, recs, method)
    assert reference.keys() == own.keys()
    for term, (value, count) in reference.items():
        assert own[term][1] == count
        torch.testing.assert_close(own[term][0], value, rtol=1e-5, atol=1e-5)
    expected, got = gradients(hf, total(reference)), gradients(model, total(own))
    same_gradients(got, expected)


SWITCHES = [dict(align="position"), dict(pool="last"), dict(lens_norm=False), dict(english_grad=True),
            dict(lc_layer=2, et_layer=2), dict(lc_layer=1, et_layer=4), dict(lc_layer=4, et_layer=4)]


@pytest.mark.parametrize("kind", ("logits", "feature"))
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_equals_its_plain_reading_in_loss_and_gradient(pairs, kind, switch):
    hf, model = pairs["llama3"]
    method, recs = Method(**{**dict(lc=kind, et=kind, lc_layer=1, et_layer=3), **switch}), records(1)
    reference, own = losses(hf, recs, method), ours(model, recs, method)
    for term, (value, count) in reference.items():
        assert own[term][1] == count
        torch.testing.assert_close(own[term][0], value, rtol=1e-5, atol=1e-5)
    expected, got = gradients(hf, total(reference)), gradients(model, total(own))
    same_gradients(got, expected)


@pytest.mark.parametrize("name", ("llama3", "smollm2", "gemma2-mild"))
@pytest.mark.parametrize("kind", ("logits", "feature"))
@pytest.mark.parametrize("term", ("lc", "et"))
def test_an_inner_loss_sends_no_gradient_above_its_layer_nor_into_the_head(pairs, term, kind, name):
    model = pairs[name][1]
    method = Method(**{"lc": "none", "et": "none", term: kind}, lc_layer=2, et_layer=2)
    got = gradients(model, ours(model, records(), method)[term][0])
    silent = {n for n, g in got.items() if not g.any()}
    for key, _ in model.named_parameters():
        above = key.startswith(("layers.2", "layers.3", "norm", "lm_head"))
        assert (key not in got or key in silent) == above, key
    assert got["embed_tokens.weight"].any(), "the embedding learns through the input, tied or not"


def test_tied_embeddings_get_from_an_inner_loss_what_the_input_alone_gives(pairs):
    """The rows of ids that are predicted but never read stay untouched: no gradient came by way of W_out."""
    model = pairs["smollm2"][1]
    recs = [Record([1, 5, 6], [7], [8, 9], [10, 11], [1, 12])]
    got = gradients(model, ours(model, recs, Method("logits", "none", 2, 2))["lc"][0])["embed_tokens.weight"]
    read = {1, 5, 6, 8}                # 9 is the last of X: predicted, never read; 7 hangs on another branch
    assert {n for n in range(97) if got[n].any()} == read


def test_a_branch_leaves_the_stream_at_its_layer(pairs):
    model, seen = pairs["llama3"][1], []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
             for layer in model.layers]
    ours(model, records(shapes=[(7, 5, 4, 6, 8)]), Method("logits", "logits", 1, 3))
    for hook in hooks:
        hook.remove()
    assert seen == [7 + 5 + 6 + 4, 7 + 5 + 6, 7 + 5 + 6, 7 + 5]


def test_terms_of_a_batch_are_the_sums_of_its_records_alone(pairs):
    model, method, recs = pairs["gemma2-mild"][1], Method("logits", "feature", 1, 3), records()
    whole, alone = ours(model, recs, method), [ours(model, [r], method) for r in recs]
    for term in whole:
        torch.testing.assert_close(whole[term][0], sum(one[term][0] for one in alone), rtol=1e-5, atol=1e-5)
        assert whole[term][1] == sum(one[term][1] for one in alone)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("align", ("branch", "position"))
def test_the_size_of_a_record_is_what_it_puts_into_a_pass(arm, align):
    method, recs = Method(*arm, 1, 3, align=align), records()
    for r in recs:                  # beside a parallel one: alone, an English-only record brings a token more
        pair = [recs[0], r]
        assert sum(dft.size_of(one, method) for one in pair) == lay_out(pair, method, 4).size()


@pytest.mark.parametrize("kind", ("logits", "feature"))
def test_a_batch_without_parallel_records_or_without_any_answer_gives_zeros_with_a_graph(pairs, kind):
    model = pairs["llama3"][1]
    for recs in (records(shapes=[(5, 6, None, None, None)]), [Record([1], [])]):
        sums = ours(model, recs, Method(kind, kind, 1, 3))
        assert sums["lc"][0] == 0 == sums["et"][0] and sums["lc"][1] == 0 == sums["et"][1]
        assert all(torch.isfinite(g).all() for g in gradients(model, total(sums)).values())
        assert all(value.requires_grad for value, _ in sums.values())


# -------------------------------------------------------------------------------------- fused cross-entropy

def dense(x, weight, targets, limit):
    logits = (x @ weight.T).float()
    logits = limit * torch.tanh(logits / limit) if limit else logits
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("n", (1, 7, 64))
@pytest.mark.parametrize("limit", (None, 30.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_cross_entropy_equals_the_dense_formula_and_its_gradients(dtype, limit, n, monkeypatch):
    monkeypatch.setattr(dft, "CHUNK", 1000)     # ten tokens of 100 pieces: several chunks, the last one short
    torch.manual_seed(n)
    x, w = (3 * torch.randn(n, 32)).to(dtype), torch.randn(100, 32).to(dtype)
    targets = torch.randint(100, (n,))
    assert (x.float() @ w.float().T).abs().max() > 30   # beyond the cap, where greedy ids would not show it missing
    got, want = [], []
    for function, out in ((cross_entropy, got), (dense, want)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(a, b, targets, limit)
        (loss / n * 1.7).backward()
        out += [loss.detach(), a.grad, b.grad]
    for mine, theirs in zip(got, want):
        assert mine.dtype == theirs.dtype
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (mine.float() - theirs.float()).norm() <= bound * theirs.float().norm()


def test_fused_cross_entropy_of_a_frozen_weight_holds_no_gradient_for_it():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    loss = cross_entropy(x, w, torch.arange(4))
    assert loss.grad_fn.dw is None and loss.grad_fn.dx.shape == x.shape
    with torch.no_grad():
        assert not cross_entropy(x, w.requires_grad_(), torch.arange(4)).requires_grad


def test_fused_cross_entropy_refuses_a_second_backward_instead_of_scaling_twice():
    x = torch.randn(4, 8, requires_grad=True)
    loss = cross_entropy(x, torch.randn(50, 8), torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_fused_cross_entropy_of_nothing_is_zero_with_a_graph():
    x, w = torch.randn(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = cross_entropy(x, w, torch.zeros(0, dtype=torch.long), 30.0)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 8) and not w.grad.any()


# -------------------------------------------------------------------------------------- lens and layer choice

@pytest.mark.parametrize("name", ("llama3", "gemma2-mild"))
def test_the_lens_equals_entropy_and_probabilities_of_transformers_states_through_its_norm_and_head(pairs, name):
    hf, model = pairs[name]
    ids = torch.randint(97, (11,)).tolist()
    asked = torch.randint(97, (11, 2))
    got, probability = lens(model, Tokens.plain([[1, 2], ids], 4), torch.arange(2, 13), asked)
    with torch.no_grad():
        for k, h in enumerate(states(hf, ids)):
            logits = F.linear(normed(hf, h, False), hf.lm_head.weight)
            limit = getattr(hf.config, "final_logit_softcapping", None)
            logits = limit * torch.tanh(logits / limit) if limit else logits
            torch.testing.assert_close(got[k], torch.distributions.Categorical(logits=logits).entropy(),
                                       rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(probability[k], logits.softmax(-1).gather(1, asked), rtol=1e-4, atol=1e-5)


def test_layers_are_where_the_first_drop_of_entropy_ends_and_the_second_begins():
    curve = [9.0, 9.0, 5.0] + [5.0] * 13 + [4.0, 3.0, 2.0] + [2.0] * 14     # 32 layers: layer 2, layers 16-18
    i, j, why = choose_layers(curve)
    assert (i, j) == (2, 15) and "2-2" in why and "16-18" in why


@pytest.mark.parametrize("between", ([5.2, 5.1, 5.2, 5.1, 5.2],         # wiggles
                                     [4.9, 4.8, 4.7, 4.6, 4.5],         # a slow slide
                                     [5.0, 4.3, 4.3, 4.3, 4.3]))        # one small step
def test_wiggles_slow_slides_and_small_steps_are_no_drops(between):
    assert choose_layers([9.0, 9.0, 5.0, *between, 3.0, 2.0, 2.1])[:2] == (2, 7)


@pytest.mark.parametrize("curve", ([5.0] * 33, [9 - k / 4 for k in range(33)], list(range(33)),
                                   [9.0] * 10 + [2.0] * 23))
def test_without_two_drops_the_papers_proportions_are_taken_and_it_says_so(curve):
    i, j, why = choose_layers(curve)
    assert (i, j) == (2, 15) and "2/32 and 15/32" in why
