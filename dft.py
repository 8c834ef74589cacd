"""dft.py: deep supervision fine-tuning (Huo et al., AAAI 2025, arXiv 2503.01275).

A parallel record holds a target-language query and answer (x_tgt, y_tgt) and their English parallels (x_en, y_en).
Ordinary fine-tuning supervises the top of the model only; deep supervision adds a loss at a bottom layer i, the end of
language conversion, and one at a middle layer j, the end of thinking in English:

    L = L_TFT + w_LC L_LC + w_ET L_ET                                                                        (1)
    L_TFT          = -log P(y_tgt | x_tgt; theta)                              target-language fine-tuning   (2)
    L_LC, logits   = -log P(x_en  | x_tgt; theta_1:i, W_out)                   language conversion           (3)
    L_ET, logits   = -log P(y_en  | x_tgt; theta_1:j, W_out)                   English thinking              (4)
    L_LC, feature  = 1 - cos(h_i of the English prompt, h_i of the target-language prompt)                   (5)
    L_ET, feature  = 1 - cos(h_L of the English answer, h_j of the target-language answer)                   (6)

(The numbers are this file's.) W_out, the head, is used by (3) and (4) but learns nothing from them. Where the paper is
silent we choose: see the switches of Method.

One pass computes (2), (3) and (4). A record is one row: the prompt P with three branches that each continue it and do
not see each other; a branch leaves the stream at the layer where it is scored, so DFT costs about |X| i/L + |Y| j/L
more tokens instead of two more forward passes:

    layers 1 .. i      P A Y X      X = x_en is scored at layer i and leaves
    layers i .. j      P A Y        Y = y_en is scored at layer j and leaves
    layers j .. L      P A          A = y_tgt is scored at the top

Shapes: see model.py. Every term is a (sum, count): the sum is divided by the count of the whole global batch, over
micro-batches and ranks, so that no token weighs more for standing in a short batch.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Tokens, Transformer, cap

TERMS = ("tft", "lc", "et")
CHUNK = 2 ** 26         # logits held at a time, 256 MiB in fp32: 2,097 tokens of LLaMA-2's 32,000 pieces


@dataclass
class Method:
    """What is supervised, where, and how the paper's open points are read."""
    lc: str = "logits"              # language conversion by: none | logits | feature
    et: str = "logits"              # English thinking by: none | logits | feature
    lc_layer: int = 0               # i, 1..L
    et_layer: int = 0               # j, i..L
    lc_weight: float = 1.0
    et_weight: float = 1.0
    align: str = "branch"           # logits: "branch" scores x_en token by token after the prompt, literally (3) and (4);
                                    # "position" reads English token t off the state at place t of the target text
    pool: str = "mean"              # features: the mean over the tokens, or the "last" one
    lens_norm: bool = True          # the final norm (frozen) stands between an inner layer and W_out
    english_grad: bool = False      # features: the English side learns too, else it is a fixed target

    def signals(self) -> dict:
        """{term: signal} of the inner terms in use."""
        return {term: kind for term, kind in (("lc", self.lc), ("et", self.et)) if kind != "none"}

    def layer(self, term: str) -> int:
        """The layer at which an inner term is read."""
        return self.lc_layer if term == "lc" else self.et_layer

    def weight(self, term: str) -> float:
        """The weight of a term in (1)."""
        return {"tft": 1.0, "lc": self.lc_weight, "et": self.et_weight}[term]


# ---------------------------------------------------------------------------------------------- the layout

@dataclass
class Batch:
    """Records laid out for one pass. A logits term is (places, targets), both (n,): the flat places that predict, and
    the ids to predict. A feature term is (places, owner, places_en, owner_en): the flat places to pool on either
    side, and the number of the pair that each belongs to."""
    tokens: Tokens
    english: Tokens | None          # the English rows, for features only
    terms: dict
    counts: dict                    # {term: tokens to predict, or pairs}

    def size(self) -> int:
        """Tokens that go in."""
        return len(self.tokens.ids) + (len(self.english.ids) if self.english else 0)


def lay_out(records: list, method: Method, num_layers: int) -> Batch:
    """Records (data.Record) -> Batch. A record without an English side takes part in L_TFT only."""
    L, i, j = num_layers, method.lc_layer, method.et_layer
    branches = method.align == "branch"
    rows, rows_en, parallel = [], [], []
    for r, record in enumerate(records):
        row = [(record.prompt, L), (record.answer, L)]
        if record.query_en is not None:
            parallel.append(r)
            row.append((record.answer_en if method.et == "logits" and branches else [], j))
            row.append((record.query_en if method.lc == "logits" and branches else [], i))
            if method.et == "feature":                      # the answer sees the prompt, up to the top
                rows_en.append([(record.prompt_en, L), (record.answer_en, L)])
            elif method.lc == "feature":
                rows_en.append([(record.prompt_en, i)])
        rows.append(row)
    tokens, english = Tokens(rows), Tokens(rows_en) if rows_en else None

    def prediction(pairs):      # [(places, targets)] of each record -> a logits term
        places, targets = ([n for pair in pairs for n in pair[side]] for side in (0, 1))
        return torch.tensor(places, dtype=torch.long), torch.tensor(targets, dtype=torch.long)

    def branch(r, s):           # the last prompt token predicts a branch's first one, each of those the next
        ids, start = rows[r][s][0], tokens.starts[r][s]
        last = tokens.starts[r][0] + len(rows[r][0][0]) - 1
        return [last, *range(start, start + len(ids) - 1)][:len(ids)], ids

    def place(start, end, ids):                             # align="position": place t predicts token t, cut to the shorter
        n = min(end - start, len(ids))
        return range(start, start + n), ids[:n]

    def pooled(starts, rows, picked, s):                    # all tokens of segment s, or its last one
        spans = [(starts[r][s], starts[r][s] + len(rows[r][s][0])) for r in picked]
        spans = spans if method.pool == "mean" else [(b - 1, b) for _, b in spans]
        return (torch.tensor([n for a, b in spans for n in range(a, b)], dtype=torch.long),
                torch.tensor([p for p, (a, b) in enumerate(spans) for _ in range(a, b)], dtype=torch.long))

    terms = {"tft": prediction([branch(r, 1) for r in range(len(records))])}
    counts = {"tft": len(terms["tft"][1])}
    for term, kind in method.signals().items():
        if kind == "logits" and branches:
            terms[term] = prediction([branch(r, 2 if term == "et" else 3) for r in parallel])
        elif kind == "logits" and term == "lc":
            terms[term] = prediction([place(tokens.starts[r][0] + records[r].query[0], tokens.starts[r][0]
                                            + records[r].query[1], records[r].query_en) for r in parallel])
        elif kind == "logits":
            terms[term] = prediction([place(tokens.starts[r][1], tokens.starts[r][1] + len(records[r].answer),
                                            records[r].answer_en) for r in parallel])
        else:
            s = int(term == "et")                           # (5) pools the prompts, (6) the answers
            terms[term] = (*pooled(tokens.starts, rows, parallel, s),
                           *(pooled(english.starts, rows_en, range(len(parallel)), s) if english else ((), ())))
        counts[term] = len(parallel) if kind == "feature" else len(terms[term][1])
    return Batch(tokens, english, terms, counts)


# ---------------------------------------------------------------------------------------------- the losses

class DFT(nn.Module):
    """A model and a method. forward is the only door: under FSDP the head's weights are whole only inside it."""

    def __init__(self, model: Transformer, method: Method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch):
        """Batch -> {term: the sum of its losses, a scalar in fp32}; (Tokens, places) -> see lens_entropy."""
        if isinstance(batch, tuple):
            return lens_entropy(self.model, *batch)
        m, L = self.method, self.model.config.num_layers
        signals = m.signals()
        h = self.model(batch.tokens, (L, *(m.layer(term) for term in signals)))
        if batch.english is not None:
            taps = ([L] if m.et == "feature" else []) + ([m.lc_layer] if m.lc == "feature" else [])
            with torch.set_grad_enabled(m.english_grad and torch.is_grad_enabled()):
                h_en = self.model(batch.english, tuple(taps))
        sums = {"tft": self.predict(h[L], batch, "tft", L)}                                             # (2)
        for term, kind in signals.items():
            layer = m.layer(term)
            if kind == "logits":
                sums[term] = self.predict(h[layer], batch, term, layer)                                 # (3), (4)
            elif batch.counts[term] == 0:
                sums[term] = h[layer].sum().float() * 0                                                 # keeps the graph
            else:
                places, owner, places_en, owner_en = batch.terms[term]
                target = pool(h[layer], batch.tokens.at(places, layer), owner, batch.counts[term])
                layer_en = L if term == "et" else layer
                english = h_en[layer_en]
                if term == "et":                            # h_L as transformers hands it out: behind the final norm
                    english = self.model.norm(english, frozen=True)
                english = pool(english, batch.english.at(places_en, layer_en), owner_en, batch.counts[term])
                sums[term] = (1 - F.cosine_similarity(english, target, dim=-1)).sum()                   # (5), (6)
        return sums

    def predict(self, x, batch: Batch, term: str, layer: int):
        """-log P of a logits term, summed, read off the residual stream x (N_k, D) of a layer."""
        places, targets = batch.terms[term]
        x = x.index_select(0, batch.tokens.at(places, layer).to(x.device))                              # (n, D)
        frozen = term != "tft"
        if self.method.lens_norm or not frozen:
            x = self.model.norm(x, frozen=frozen)
        weight = self.model.head_weight.detach() if frozen else self.model.head_weight
        return cross_entropy(x, weight.to(x.dtype), targets.to(x.device), self.model.config.final_cap)


def pool(x, places, owner, count: int):
    """Mean of the states x[places] (n, D) of each owner (n,) -> (count, D) in fp32."""
    owner = owner.to(x.device)
    total = torch.zeros(count, x.shape[1], device=x.device).index_add(0, owner, x[places.to(x.device)].float())
    return total / torch.bincount(owner, minlength=count)[:, None]


def cross_entropy(x, weight, targets, limit: float | None = None):
    """Sum over tokens of -log softmax(cap(x W^T))[target], a scalar in fp32, without ever holding all logits.

    x (n, D) and weight (V, D) of one dtype, targets (n,) int64, limit: the soft cap on logits or None. Nothing to
    score gives 0 with a graph. A weight that requires no gradient costs no gradient buffer.
    """
    grads = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return FusedCrossEntropy.apply(x, weight, targets, limit, *grads)


class FusedCrossEntropy(torch.autograd.Function):
    """Chunks of tokens: logits by a product in the compute dtype, softmax in fp32, and the gradient at once, while the
    logits are there; backward only scales it. Three products in all, as in dense cross-entropy."""

    @staticmethod
    def forward(ctx, x, weight, targets, limit, x_grad, weight_grad):
        chunk = max(1, CHUNK // len(weight))
        total = torch.zeros((), device=x.device)
        ctx.dx = torch.empty_like(x) if x_grad else None
        ctx.dw = torch.zeros_like(weight) if weight_grad else None
        for a in range(0, len(x), chunk):
            part, target = x[a:a + chunk], targets[a:a + chunk, None]                                   # (c, D), (c, 1)
            logits = cap((part @ weight.T).float(), limit)                                              # (c, V)
            norm = logits.logsumexp(-1, keepdim=True)                                                   # (c, 1)
            total += (norm - logits.gather(1, target)).sum()
            if not (x_grad or weight_grad):
                continue
            slope = 1 - (logits / limit) ** 2 if limit else None        # d cap(z)/dz = 1 - tanh(z/cap)^2
            g = logits.sub_(norm).exp_().scatter_add_(1, target, torch.full_like(norm, -1))             # softmax - one-hot
            g = (g if slope is None else g.mul_(slope)).to(x.dtype)
            if x_grad:
                torch.mm(g, weight, out=ctx.dx[a:a + chunk])
            if weight_grad:
                ctx.dw.addmm_(g.T, part)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dw = (None if d is None else d.mul_(scale) for d in (ctx.dx, ctx.dw))   # in place: they are large
        del ctx.dx, ctx.dw                                  # so a second backward fails instead of scaling twice
        return dx, dw, None, None, None, None


# ---------------------------------------------------------------------------------------------- which layers

@torch.no_grad()
def lens_entropy(model: Transformer, tokens: Tokens, places):
    """Entropy, in nats, of the next-token distribution that W_out reads off every layer (the logit lens) at the flat
    places (n,): (L + 1, n) in fp32."""
    L = model.config.num_layers
    h = model(tokens, tuple(range(L + 1)))
    out = torch.empty(L + 1, len(places))
    for k in range(L + 1):
        for a in range(0, len(places), 256):
            logp = model.logits(h[k][places[a:a + 256].to(h[k].device)]).log_softmax(-1)                # (<= 256, V)
            out[k, a:a + 256] = -(logp.exp() * logp).sum(-1)
    return out


def choose_layers(entropy: list):
    """Mean entropy after layers 0..L of target-language prompts -> (i, j, a sentence that says why).

    As the paper reads it: the first drop of the entropy ends with language conversion (i), the second begins where
    English thinking ends (j). A drop is a run of layers that each lose more than 5 % of the curve's range; it must
    lose 15 % of it in all. On a curve without two such drops, i and j are the paper's share of the depth: 2/32, 15/32.
    """
    L = len(entropy) - 1
    falls = [entropy[k - 1] - entropy[k] for k in range(1, L + 1)]      # falls[k - 1]: what layer k takes off
    span = max(entropy) - min(entropy)
    drops, k = [], 1
    while k <= L:
        first = k
        while k <= L and falls[k - 1] > 0.05 * span:
            k += 1
        if sum(falls[first - 1:k - 1]) > 0.15 * span:
            drops.append((first, k - 1))                                # layers first..k-1 make it fall
        k += k == first
    if len(drops) >= 2 and drops[0][1] < drops[1][0] - 1:
        i, j = drops[0][1], drops[1][0] - 1
        return i, j, f"entropy falls in layers {drops[0][0]}-{drops[0][1]} and again in {drops[1][0]}-{drops[1][1]}"
    i, j = max(1, round(2 / 32 * L)), max(1, round(15 / 32 * L))
    seen = "one drop" if len(drops) == 1 else "no two separate drops"
    return i, j, f"entropy shows {seen} on this model; these are the paper's 2/32 and 15/32 of the depth"
