"""The method computed slowly and plainly: one record at a time, one whole forward pass of transformers for
each term."""
import torch
import torch.nn.functional as F


def losses(hf, records, method):
    """{term: (sum, count)} of dft.DFT on these data.Records, by a transformers model. Differentiable."""
    L, i, j = hf.config.num_hidden_layers, method.lc_layer, method.et_layer
    total = {"tft": [0.0, 0]}
    for term in method.signals():
        total[term] = [0.0, 0]

    def add(term, value, count):
        total[term][0] = total[term][0] + value
        total[term][1] += count

    for r in records:
        add("tft", *continuation(hf, r.prompt, r.answer, L, None, method))
        if r.query_en is None:
            continue
        for term, layer, english in (("lc", i, r.query_en), ("et", j, r.answer_en)):
            kind = getattr(method, term)
            if kind == "logits" and method.align == "branch":
                add(term, *continuation(hf, r.prompt, english, layer, "frozen", method))
            elif kind == "logits":      # place t of the target text predicts English token t
                h = states(hf, r.prompt + r.answer)[layer]
                first, last = r.query if term == "lc" else (len(r.prompt), len(r.prompt) + len(r.answer))
                n = min(last - first, len(english))
                add(term, cross_entropy(hf, h[first:first + n], english[:n], "frozen", method), n)
            elif kind == "feature":
                with torch.set_grad_enabled(method.english_grad):
                    en = states(hf, r.prompt_en + r.answer_en)
                tgt = states(hf, r.prompt + r.answer)
                if term == "lc":
                    a, b = en[i][:len(r.prompt_en)], tgt[i][:len(r.prompt)]
                else:
                    a, b = normed(hf, en[L], frozen=True)[len(r.prompt_en):], tgt[j][len(r.prompt):]
                a, b = (x[-1] if method.pool == "last" else x.mean(0) for x in (a, b))
                add(term, 1 - F.cosine_similarity(a, b, dim=0), 1)
    return total


def states(hf, ids):
    """The residual stream (T, D) after layers 0..L; transformers' own last one has the final norm on it
    already."""
    caught = []
    hook = hf.model.layers[-1].register_forward_hook(lambda module, args, out: caught.append(out))
    h = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]
    hook.remove()
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return [x[0] for x in h] + [last.reshape(h[0].shape)[0]]


def continuation(hf, prompt, ids, layer, frozen, method):
    """(-log P(ids | prompt) summed, len(ids)), read off `layer`."""
    h = states(hf, prompt + ids)[layer]
    return cross_entropy(hf, h[len(prompt) - 1:len(prompt) + len(ids) - 1], ids, frozen, method), len(ids)


def cross_entropy(hf, h, ids, frozen, method):
    if not frozen or method.lens_norm:
        h = normed(hf, h, frozen)
    weight = hf.lm_head.weight.detach() if frozen else hf.lm_head.weight
    logits = F.linear(h, weight)
    limit = getattr(hf.config, "final_logit_softcapping", None)
    if limit:
        logits = limit * torch.tanh(logits / limit)
    return F.cross_entropy(logits, torch.tensor(ids), reduction="sum")


def normed(hf, h, frozen):
    norm = hf.model.norm
    if not frozen:
        return norm(h)
    return torch.func.functional_call(norm, {"weight": norm.weight.detach()}, (h,))

