"""The method computed slowly and plainly: one record at a time, and for each loss a whole forward
pass of transformers."""
import torch
import torch.nn.functional as F


def losses(hf, records, method):
    """{term: (sum, count)} of these data.Records by a transformers model. Differentiable."""
    L = hf.config.num_hidden_layers
    total = {"tft": [0.0, 0]}
    for term in method.signals():
        total[term] = [0.0, 0]

    def add(term, value, count):
        total[term][0] = total[term][0] + value
        total[term][1] += count

    for record in records:
        prompt, answer = record.prompt, record.answer
        add("tft", continuation(hf, prompt, answer, L, None, method), len(answer))
        if record.query_en is None:
            continue
        for term, signal in method.signals().items():
            layer = method.layer(term)
            english = record.query_en if term == "lc" else record.answer_en
            if signal == "logits" and method.align == "branch":
                add(term, continuation(hf, prompt, english, layer, "frozen", method), len(english))
            elif signal == "logits":        # the state at t - 1 predicts English token t
                first, end = len(prompt), len(prompt) + len(answer)
                if term == "lc":
                    first, end = record.query
                n = min(end - first, len(english))
                h = states(hf, prompt + answer)[layer][first - 1:first - 1 + n]
                add(term, cross_entropy(hf, h, english[:n], "frozen", method), n)
            else:
                add(term, feature(hf, record, term, method), 1)
    return total


def feature(hf, record, term, method):
    """1 - cos of the pooled states of the English text and of the target-language text."""
    h = states(hf, record.prompt + record.answer)
    with torch.set_grad_enabled(method.english_grad):
        h_en = states(hf, record.prompt_en + record.answer_en)
    if term == "lc":        # the queries without their templates, both at layer i
        a = h_en[method.lc_layer][slice(*record.prompt_en_query)]
        b = h[method.lc_layer][slice(*record.query)]
    else:                   # the answers: h_L of the English one, after the norm; h_j of the other
        a = norm(hf, h_en[-1], "frozen")[len(record.prompt_en):]
        b = h[method.et_layer][len(record.prompt):]
    a, b = (a[-1], b[-1]) if method.pool == "last" else (a.mean(0), b.mean(0))
    return 1 - F.cosine_similarity(a, b, dim=0)


def states(hf, ids):
    """The residual stream (T, D) after layers 0..L. The last of transformers' hidden_states comes
    after the final norm, so a hook takes it before that."""
    last = []
    hook = hf.model.layers[-1].register_forward_hook(lambda module, args, out: last.append(out))
    h = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return [x[0] for x in h[:-1]] + [last[0][0]]


def continuation(hf, prompt, ids, layer, frozen, method):
    """-log P(ids | prompt), summed, with the head on the states after `layer`."""
    h = states(hf, prompt + ids)[layer]
    return cross_entropy(hf, h[len(prompt) - 1:len(prompt) + len(ids) - 1], ids, frozen, method)


def cross_entropy(hf, h, ids, frozen, method):
    """-log P(ids), summed, ids (n,) predicted from states h (n, D)."""
    if not frozen or method.lens_norm:
        h = norm(hf, h, frozen)
    weight = hf.lm_head.weight.detach() if frozen else hf.lm_head.weight
    return F.cross_entropy(cap(hf, F.linear(h, weight)), torch.tensor(ids), reduction="sum")


def norm(hf, h, frozen):
    """The final norm; frozen: its weight gets no gradient."""
    weight = hf.model.norm.weight
    weight = weight.detach() if frozen else weight
    return torch.func.functional_call(hf.model.norm, {"weight": weight}, (h,))


def cap(hf, logits):
    """Gemma-2's cap on logits."""
    limit = getattr(hf.config, "final_logit_softcapping", None)
    return limit * torch.tanh(logits / limit) if limit else logits
