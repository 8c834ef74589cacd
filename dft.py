"""dft.py: deep supervision fine-tuning (Huo et al., AAAI 2025, arXiv 2503.01275).

A parallel record holds a query and an answer in the target language (x_tgt, y_tgt) and in English
(x_en, y_en). Ordinary fine-tuning supervises only the last layer. Deep supervision adds a loss at a
bottom layer i, where the query should have been converted to English, and one at a middle layer j,
where the English answer should have been found:

    loss = L_TFT + w_LC L_LC + w_ET L_ET                                                      (1)
    L_TFT        = -log P(y_tgt | x_tgt; theta)                   target-language fine-tuning (2)
    L_LC logits  = -log P(x_en | x_tgt; theta_1:i, W_out)         language conversion         (3)
    L_ET logits  = -log P(y_en | x_tgt; theta_1:j, W_out)         English thinking            (4)
    L_LC feature = 1 - cos(h_i of the English query, h_i of the target-language query)        (5)
    L_ET feature = 1 - cos(h_L of the English answer, h_j of the target-language answer)      (6)

The equation numbers are ours. theta_1:k: the embedding and layers 1..k; h_k: the mean output of
layer k over the tokens of a text, h_L after the final norm. W_out: the output head; (3) and (4)
send no gradient through it (a head tied to the embedding is still trained as the embedding).

One forward pass computes (2), (3) and (4). Each record is one row: the prompt P and up to three
segments that continue P and do not attend to one another. The tokens of a segment are dropped
after the layer at which its loss is computed:

    layers 1 .. i       P A Y X      loss on X = x_en at layer i
    layers i+1 .. j     P A Y        loss on Y = y_en at layer j
    layers j+1 .. L     P A          loss on A = y_tgt at layer L

An example, with words for token ids and without the prompt template:

    index      0      1        2      3      4      5      6     7         8
    id         法国    货币?    欧元    <eos>  euro   <eos>  The   currency  ?
    segment    P      P        A      A      Y      Y      X     X         X
    position   0      1        2      3      2      3      2     3         4

Each state predicts the next token of its segment, and the last token of P predicts the first token
of every segment: indices 1, 2 predict A; 1, 4 predict Y; 1, 6, 7 predict X.

Shape letters are those of model.py. Each loss is summed and then divided by its number of tokens
(or pairs) in the global batch, so that all tokens of one loss have equal weight.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import InputError, Packed, Transformer, cap, to_device

TERMS = ("tft", "lc", "et")
CHUNK = {"cpu": 2 ** 25, "cuda": 2 ** 27}       # logits per chunk of the loss; 4 bytes each in fp32


@dataclass(frozen=True)
class Method:
    """Which losses to use, and at which layers. The paper does not specify the last four fields."""
    lc: str = "logits"              # how L_LC is computed: none | logits | feature
    et: str = "logits"              # how L_ET is computed: none | logits | feature
    lc_layer: int = 0               # i, from 1 to L; 0: not chosen yet
    et_layer: int = 0               # j, from i to L; 0: not chosen yet
    lc_weight: float = 1.0
    et_weight: float = 1.0
    align: str = "branch"           # logits: "branch": English tokens follow the prompt, as in (3)
                                    # and (4); "position": the state of target-language token t - 1
                                    # predicts English token t
    pool: str = "mean"              # features: the "mean" over the tokens or the "last" token
    lens_norm: bool = True          # logits: apply the final norm (frozen) before W_out
    english_grad: bool = False      # features: backpropagate through the English side as well

    def __post_init__(self):
        if len(self.signals()) == 2 and self.et_layer and self.lc_layer > self.et_layer:
            raise InputError(f"lc_layer {self.lc_layer} is above et_layer {self.et_layer}")

    def signals(self) -> dict:
        """The inner losses in use: {"lc" and/or "et": "logits" or "feature"}."""
        both = {"lc": self.lc, "et": self.et}
        return {term: signal for term, signal in both.items() if signal != "none"}

    def layer(self, term: str) -> int:
        return self.lc_layer if term == "lc" else self.et_layer

    def weight(self, term: str) -> float:
        return {"tft": 1.0, "lc": self.lc_weight, "et": self.et_weight}[term]


# --------------------------------------------------------------------------------------- the layout

@dataclass
class Batch:
    """Records laid out for one forward pass."""
    packed: Packed
    english: Packed     # English prompts and answers, for feature losses; may be empty
    losses: dict        # {term: a pair for each record}; logits: (indices of the states that
                        # predict, ids that they predict); feature: (indices to pool in `packed`,
                        # indices to pool in `english`)
    counts: dict        # {term: number of ids that are predicted, or of pairs}
    tokens: int         # number of tokens in `packed` and `english`


def lay_out(records: list, method: Method, L: int) -> Batch:
    """data.Records -> Batch for a model of L layers. Records without an English side have only the
    loss (2)."""
    packed, english, signals = Packed(), Packed(), method.signals()
    losses = {"tft": [], **{term: [] for term in signals}}
    for record in records:
        prompt = packed.add(record.prompt, depth=L)
        answer = packed.add(record.answer, depth=L, after=prompt)
        # A directly follows P: each token is predicted by the state before it.
        losses["tft"].append(([index - 1 for index in answer], record.answer))
        if record.query_en is None:
            continue
        query = prompt[slice(*record.query)]        # the query without its template
        english_spans = {}
        if "feature" in signals.values():           # the English pass ends at layer i or at the top
            depth_en = L if method.et == "feature" else method.lc_layer
            prompt_en = english.add(record.prompt_en, depth_en)
            english_spans["lc"] = prompt_en[slice(*record.prompt_en_query)]
            if method.et == "feature":
                english_spans["et"] = english.add(record.answer_en, depth_en, after=prompt_en)
        for term, span, ids in (("et", answer, record.answer_en), ("lc", query, record.query_en)):
            signal = signals.get(term)
            if signal == "feature":
                losses[term].append((span, english_spans[term]))
            elif signal == "logits" and method.align == "branch":       # the segments Y and X
                segment = packed.add(ids, method.layer(term), after=prompt)
                indices = [prompt[-1], *segment][:len(ids)]     # the last id predicts nothing
                losses[term].append((indices, ids))
            elif signal == "logits":                            # up to the end of the shorter text
                n = min(len(span), len(ids))
                losses[term].append(([index - 1 for index in span[:n]], ids[:n]))
    if "feature" in signals.values() and not len(english):
        # Under FSDP every rank must run the English pass, if only on one token without a loss.
        english.add(records[0].prompt[:1], depth=L)
    counts = {}
    for term, pairs in losses.items():
        is_feature = signals.get(term) == "feature"
        counts[term] = len(pairs) if is_feature else sum(len(ids) for _, ids in pairs)
    return Batch(packed, english, losses, counts, len(packed) + len(english))


# --------------------------------------------------------------------------------------- the losses

class DFT(nn.Module):
    """The model with its losses. Call only forward(): under FSDP the weights of the head are
    gathered only inside it."""

    def __init__(self, model: Transformer, method: Method):
        super().__init__()
        self.model, self.method = model, method
        self.nll = nll                          # or its compiled version

    def compile_parts(self, flex: bool) -> None:
        """Use torch.compile for the layers and the loss; see Transformer.compile_layers."""
        torch._dynamo.config.specialize_float = True    # else the cap becomes a tensor in fp64
        self.model.compile_layers(flex)
        self.nll = torch.compile(nll, dynamic=True)

    def forward(self, batch: Batch | tuple) -> dict:
        """{term: the sum of its losses, a scalar in fp32}.

        For a tuple (packed, indices, ids) it returns lens(self.model, packed, indices, ids): under
        FSDP the weights are whole only inside forward()."""
        if isinstance(batch, tuple):
            return lens(self.model, *batch)
        method, L = self.method, self.model.config.num_hidden_layers
        signals = method.signals()
        # {k: the output of layer k, (N_k, D)}
        outputs = self.model(batch.packed, (L, *(method.layer(term) for term in signals)))
        layers_en = {"lc": method.lc_layer, "et": L}            # layers of the English side
        if len(batch.english):
            used = tuple(layers_en[term] for term in signals if signals[term] == "feature")
            with torch.set_grad_enabled(method.english_grad and torch.is_grad_enabled()):
                outputs_en = self.model(batch.english, used)
        sums = {"tft": self.logits_loss(outputs[L], L, batch, "tft")}                       # (2)
        for term, signal in signals.items():
            layer = method.layer(term)
            if signal == "logits":
                sums[term] = self.logits_loss(outputs[layer], layer, batch, term)      # (3), (4)
                continue
            layer_en = layers_en[term]
            states_en = outputs_en[layer_en]
            if term == "et":                    # h_L as transformers returns it: after the norm
                states_en = self.model.norm(states_en, frozen=True)
            spans = [span for span, _ in batch.losses[term]]
            spans_en = [span for _, span in batch.losses[term]]
            # (pairs, D) each
            pooled_en = pool(states_en, batch.english, layer_en, spans_en, method.pool)
            pooled = pool(outputs[layer], batch.packed, layer, spans, method.pool)
            sums[term] = (1 - F.cosine_similarity(pooled_en, pooled, dim=-1)).sum()    # (5), (6)
        return sums

    def logits_loss(self, x, layer: int, batch: Batch, term: str):
        """The summed -log P of a logits loss, given the output x (N_k, D) of `layer`."""
        indices, ids = [], []
        for span, target in batch.losses[term]:
            indices += span
            ids += target
        x = x.index_select(0, to_device(batch.packed.index(indices, layer), x.device))      # (n, D)
        inner = term != "tft"
        if self.method.lens_norm or not inner:
            x = self.model.norm(x, frozen=inner)
        weight = self.model.head_weight.detach() if inner else self.model.head_weight
        target = to_device(torch.tensor(ids, dtype=torch.long), x.device)
        limit = self.model.config.final_logit_softcapping
        return cross_entropy(x, weight.to(x.dtype), target, limit, self.nll)


def pool(x, packed: Packed, layer: int, spans: list, how: str = "mean"):
    """Pool the output x (N_k, D) of `layer` over each span -> (spans, D) in fp32.

    spans: lists of flat indices; how: the "mean" over the tokens or the "last" token."""
    indices, span_of = [], []                   # span_of: the number of the span of each state
    for number, span in enumerate(spans):
        span = span[-1:] if how == "last" else span
        indices += span
        span_of += [number] * len(span)
    states = x.index_select(0, to_device(packed.index(indices, layer), x.device)).float()  # (n, D)
    span_of = torch.tensor(span_of, dtype=torch.long)                               # (n,)
    count = torch.bincount(span_of, minlength=len(spans))[:, None]                   # (spans, 1)
    total = states.new_zeros(len(spans), x.shape[1])
    total = total.index_add(0, to_device(span_of, x.device), states)
    return total / to_device(count, x.device)


def nll(logits, target, limit: float | None, with_grad: bool):
    """Logits (c, V) of a chunk before their cap, target (c, 1) -> the summed
    -log softmax(cap(logits))[target] in fp32, and its gradient for the logits, (c, V) in their
    dtype, or None."""
    z = cap(logits.float(), limit)
    logp = z.log_softmax(-1)
    loss = -logp.gather(1, target).sum()
    if not with_grad:
        return loss, None
    # From here on logp and z are overwritten. torch.compile fuses a comparison, but no scatter.
    one_hot = torch.arange(z.shape[1], device=z.device) == target   # (c, V)
    g = logp.exp_().sub_(one_hot.byte())                            # softmax - one-hot
    if limit is not None:                               # cap'(u) = 1 - (cap(u) / limit)^2
        g *= 1 - z.div_(limit).square_()
    return loss, g.to(logits.dtype)


def cross_entropy(x, weight, target, limit: float | None = None, nll=nll):
    """The sum over n tokens of -log softmax(cap(x W^T))[target], a scalar in fp32.

    x (n, D) and weight (V, D) of one dtype, target (n,) int64, limit: the soft cap or None. The
    (n, V) logits are never in memory at once. n = 0 gives a 0 that can be backpropagated.
    """
    x_grad = torch.is_grad_enabled() and x.requires_grad
    weight_grad = torch.is_grad_enabled() and weight.requires_grad
    return FusedCrossEntropy.apply(x, weight, target, limit, nll, x_grad, weight_grad)


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of a chunk of logits; on a GPU a multiple of 128, the size of a tile of its products."""
    rows = CHUNK[device] // vocab_size
    return max(1, rows) if device == "cpu" else max(128, rows - rows % 128)


class FusedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradient chunk by chunk in forward, so that no logits are kept; backward
    only scales the gradient. It takes three matrix products, as the dense form does."""

    @staticmethod
    def forward(ctx, x, weight, target, limit, nll, x_grad, weight_grad):
        chunk = chunk_rows(len(weight), x.device.type)
        total = torch.zeros((), device=x.device)
        ctx.dx = torch.empty_like(x) if x_grad else None
        ctx.dw = torch.zeros_like(weight) if weight_grad else None
        for begin in range(0, len(x), chunk):
            part = x[begin:begin + chunk]                                           # (c, D)
            ids = target[begin:begin + chunk, None]                                 # (c, 1)
            loss, g = nll(part @ weight.T, ids, limit, x_grad or weight_grad)       # g: (c, V)
            total += loss
            if x_grad:
                torch.mm(g, weight, out=ctx.dx[begin:begin + chunk])
            if weight_grad:
                ctx.dw.addmm_(g.T, part)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx = None if ctx.dx is None else ctx.dx.mul_(scale)         # in place to save memory
        dw = None if ctx.dw is None else ctx.dw.mul_(scale)
        del ctx.dx, ctx.dw                      # a second backward fails instead of scaling twice
        return dx, dw, None, None, None, None, None


# ------------------------------------------------------------------------------------- which layers

@torch.no_grad()
def lens(model: Transformer, packed: Packed, indices: list, ids):
    """The logit lens: final norm and head on the output of each layer 0..L, at n flat indices.

    Returns the entropy in nats, (L + 1, n), and the probabilities of the candidate ids (n, m),
    (L + 1, n, m), both in fp32 on the CPU. All tokens of `packed` must have depth L.
    """
    outputs = model(packed, tuple(range(model.config.num_hidden_layers + 1)))
    entropy = torch.empty(len(outputs), len(indices))
    probability = torch.empty(len(outputs), *ids.shape)
    for k, x in outputs.items():
        for part in torch.arange(len(indices)).split(256):          # to save memory
            chunk = torch.tensor(indices)[part].to(x.device)
            p = model.logits(x[chunk]).softmax(-1)                                   # (<= 256, V)
            entropy[k, part] = torch.special.entr(p).sum(-1).cpu()
            probability[k, part] = p.gather(1, ids[part].to(p.device)).cpu()
    return entropy, probability


def choose_layers(entropy: list):
    """Choose i and j from the mean lens entropy after layers 0..L on target-language queries.

    Returns (i, j, reason). As in the paper, i is the last layer of the first drop of the entropy
    and j the layer before the second drop begins. A drop is a run of layers that each lower the
    entropy by more than 5 % of its range and together by more than 15 %. With fewer than two drops
    (as in SmolLM2) i and j are at the paper's 2/32 and 15/32 of the depth.
    """
    L, span = len(entropy) - 1, max(entropy) - min(entropy)
    drops, first = [], None                     # (first, last) layer of each drop
    for k in range(1, L + 2):                   # L + 1 ends a drop that reaches the last layer
        falls = k <= L and entropy[k - 1] - entropy[k] > 0.05 * span
        if falls and first is None:
            first = k
        elif not falls and first is not None:
            if entropy[first - 1] - entropy[k - 1] > 0.15 * span:
                drops.append((first, k - 1))
            first = None
    if len(drops) >= 2:
        (first_1, i), (first_2, last_2) = drops[:2]
        reason = f"the entropy drops in layers {first_1}-{i} and again in {first_2}-{last_2}"
        return i, first_2 - 1, reason
    reason = "no two drops of the entropy found; these are 2/32 and 15/32 of the depth"
    return max(1, round(2 / 32 * L)), max(1, round(15 / 32 * L)), reason
