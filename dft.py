"""dft.py: deep supervision fine-tuning (Huo et al., AAAI 2025, arXiv 2503.01275).

A parallel record holds a target-language query and answer (x_tgt, y_tgt) and their English parallels (x_en,
y_en). Ordinary fine-tuning supervises the top of the model only; deep supervision adds a loss at a bottom
layer i, the end of language conversion, and one at a middle layer j, the end of thinking in English:

    L = L_TFT + w_LC L_LC + w_ET L_ET                                                                   (1)
    L_TFT        = -log P(y_tgt | x_tgt; theta)                            target-language fine-tuning  (2)
    L_LC logits  = -log P(x_en | x_tgt; theta_1:i, W_out)                  language conversion          (3)
    L_ET logits  = -log P(y_en | x_tgt; theta_1:j, W_out)                  English thinking             (4)
    L_LC feature = 1 - cos(h_i of the English prompt, h_i of the target-language prompt)                (5)
    L_ET feature = 1 - cos(h_L of the English answer, h_j of the target-language answer)                (6)

(The numbers are this file's.) W_out, the head, is used by (3) and (4) but learns nothing from them. Where the
paper is silent we choose: see the switches of Method.

One pass computes (2), (3) and (4). A record is one row: the prompt P with three branches that each continue
it and do not see each other; a branch leaves the stream at the layer where it is scored, so that DFT costs
about |X| i/L + |Y| j/L more tokens instead of two more forward passes:

    layers 1 .. i      P A Y X      X = x_en is scored at layer i and leaves
    layers i .. j      P A Y        Y = y_en is scored at layer j and leaves
    layers j .. L      P A          A = y_tgt is scored at the top

Shapes: see model.py. Every term is a (sum, count): the sum is divided by the count of the whole global batch,
over micro-batches and ranks, so that no token weighs more for standing in a short batch.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Tokens, Transformer, cap

TERMS = ("tft", "lc", "et")
CHUNK = 2 ** 25         # logits held at a time, 128 MiB in fp32: 1,048 tokens of LLaMA-2's 32,000 pieces


@dataclass
class Method:
    """What is supervised, where, and how the paper's open points are read."""
    lc: str = "logits"              # language conversion by: none | logits | feature
    et: str = "logits"              # English thinking by: none | logits | feature
    lc_layer: int = 0               # i, 1..L
    et_layer: int = 0               # j, i..L
    lc_weight: float = 1.0
    et_weight: float = 1.0
    align: str = "branch"           # logits: "branch" scores the English tokens one by one after the prompt,
                                    # as (3) and (4) say; "position" reads token t off place t of the target
                                    # text
    pool: str = "mean"              # features: the mean over the tokens, or the "last" one
    lens_norm: bool = True          # the final norm, frozen, stands between an inner layer and W_out
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

    def branches(self, term: str) -> bool:
        """Whether a term has a branch of its own in the row."""
        return self.signals().get(term) == "logits" and self.align == "branch"


# ------------------------------------------------------------------------------------------- the layout

@dataclass
class Batch:
    """Records laid out for one pass. A logits term is (places, targets), (n,) each: the flat places that
    predict, and the ids to predict. A feature term is (places, owner, places_en, owner_en): the flat places
    to pool on either side, and the number of the pair that each belongs to."""
    tokens: Tokens
    english: Tokens | None          # the English rows, for features only
    terms: dict
    counts: dict                    # {term: tokens to predict, or pairs}

    def size(self) -> int:
        """Tokens that go in."""
        return len(self.tokens.ids) + (len(self.english.ids) if self.english else 0)


def size_of(record, method: Method) -> int:
    """Tokens that a record puts into a pass, counted without laying it out."""
    names = ["prompt", "answer"]
    if record.query_en is not None:
        names += ["answer_en"] * method.branches("et") + ["query_en"] * method.branches("lc")
        names += ["prompt_en"] * ("feature" in (method.lc, method.et))
        names += ["answer_en"] * (method.et == "feature")
    return sum(len(getattr(record, name)) for name in names)


def lay_out(records: list, method: Method, L: int) -> Batch:
    """data.Records -> Batch for a model of L layers. One without an English side takes part in (2) only."""
    rows, rows_en, parallel = [], [], []
    for r, record in enumerate(records):
        row = [(record.prompt, L), (record.answer, L)]                      # segments 0 and 1: P and A
        if record.query_en is not None:
            parallel.append(r)
            row.append((record.answer_en if method.branches("et") else [], method.et_layer))        # 2: Y
            row.append((record.query_en if method.branches("lc") else [], method.lc_layer))         # 3: X
            if method.et == "feature":
                rows_en.append([(record.prompt_en, L), (record.answer_en, L)])
            elif method.lc == "feature":
                rows_en.append([(record.prompt_en, method.lc_layer)])
        rows.append(row)
    if "feature" in (method.lc, method.et) and not rows_en:     # under FSDP every rank must run the English
        rows_en = [[(records[0].prompt[:1], L), ([], L)]]       # pass: here with a token that no pair owns
    tokens, english = Tokens(rows), Tokens(rows_en) if rows_en else None

    def branch(r, s):           # the last prompt token predicts a branch's first one, each of those the next
        start, ids, prompt_end = tokens.starts[r][s], rows[r][s][0], tokens.starts[r][0] + len(rows[r][0][0])
        return [prompt_end - 1, *range(start, start + len(ids) - 1)][:len(ids)], ids

    def in_place(r, term):  # align="position": place t predicts English token t, up to the shorter text's end
        record, starts = records[r], tokens.starts[r]
        first, end = record.query if term == "lc" else (0, len(record.answer))
        ids = (record.query_en if term == "lc" else record.answer_en)[:end - first]
        first += starts[term == "et"]
        return range(first, first + len(ids)), ids

    def prediction(pairs):      # (places, ids) of each record -> the two tensors of a logits term
        return tuple(torch.tensor([n for pair in pairs for n in pair[k]], dtype=torch.long) for k in (0, 1))

    def pooled(rows, starts, s):  # all tokens of segment s of these rows, or the last one; and whose they are
        spans = [(start[s], start[s] + len(row[s][0])) for row, start in zip(rows, starts)]
        spans = spans if method.pool == "mean" else [(end - 1, end) for _, end in spans]
        return prediction([(range(a, b), [p] * (b - a)) for p, (a, b) in enumerate(spans)])

    terms = {"tft": prediction([branch(r, 1) for r in range(len(records))])}
    counts = {"tft": len(terms["tft"][1])}
    for term, kind in method.signals().items():
        if kind == "feature":           # (5) pools the prompts, segment 0, and (6) the answers, segment 1
            s, starts = int(term == "et"), [tokens.starts[r] for r in parallel]
            terms[term] = (*pooled([rows[r] for r in parallel], starts, s),
                           *pooled(rows_en[:len(parallel)], english.starts, s))
        elif method.align == "branch":
            terms[term] = prediction([branch(r, 2 if term == "et" else 3) for r in parallel])
        else:
            terms[term] = prediction([in_place(r, term) for r in parallel])
        counts[term] = len(parallel) if kind == "feature" else len(terms[term][1])
    return Batch(tokens, english, terms, counts)


# ------------------------------------------------------------------------------------------- the losses

class DFT(nn.Module):
    """A model and a method. forward is the only door: under FSDP the head is whole only behind it."""

    def __init__(self, model: Transformer, method: Method):
        super().__init__()
        self.model, self.method, self.score = model, method, score

    def compile_parts(self, flex: bool) -> None:
        """Layers and loss by torch.compile; see Transformer.compile_layers."""
        self.model.compile_layers(flex)
        self.score = torch.compile(score, dynamic=True)

    def forward(self, batch) -> dict:
        """Batch -> {term: the sum of its losses, a scalar in fp32}; (Tokens, places, ids) -> see lens."""
        if isinstance(batch, tuple):
            return lens(self.model, *batch)
        m, L = self.method, self.model.config.num_layers
        signals = m.signals()
        h = self.model(batch.tokens, (L, *(m.layer(term) for term in signals)))
        if batch.english is not None:
            taps = ([L] if m.et == "feature" else []) + ([m.lc_layer] if m.lc == "feature" else [])
            with torch.set_grad_enabled(m.english_grad and torch.is_grad_enabled()):
                h_en = self.model(batch.english, tuple(taps))
        sums = {"tft": self.predict(h[L], batch, "tft", L)}                                         # (2)
        for term, kind in signals.items():
            layer = m.layer(term)
            if kind == "logits":
                sums[term] = self.predict(h[layer], batch, term, layer)                             # (3), (4)
            else:
                places, owner, places_en, owner_en = batch.terms[term]
                target = pool(h[layer], batch.tokens.at(places, layer), owner)
                layer_en = L if term == "et" else layer
                english = h_en[layer_en]
                if term == "et":        # h_L as transformers hands it out: behind the final norm
                    english = self.model.norm(english, frozen=True)
                english = pool(english, batch.english.at(places_en, layer_en), owner_en)
                sums[term] = (1 - F.cosine_similarity(english, target, dim=-1)).sum()               # (5), (6)
        return sums

    def predict(self, x, batch: Batch, term: str, layer: int):
        """-log P of a logits term, summed, read off the residual stream x (N_k, D) of a layer."""
        places, targets = batch.terms[term]
        x = x.index_select(0, batch.tokens.at(places, layer).to(x.device))                          # (n, D)
        frozen = term != "tft"
        if self.method.lens_norm or not frozen:
            x = self.model.norm(x, frozen=frozen)
        weight = self.model.head_weight.detach() if frozen else self.model.head_weight
        return cross_entropy(x, weight.to(x.dtype), targets.to(x.device), self.model.config.final_cap,
                             self.score)


def pool(x, places, owner):
    """The mean of the states x[places], (n, D), of each owner (n,) -> (pairs, D) in fp32."""
    x, owner = x[places.to(x.device)].float(), owner.to(x.device)
    count = torch.bincount(owner)
    return x.new_zeros(len(count), x.shape[1]).index_add(0, owner, x) / count[:, None]


def score(logits, targets, limit: float | None, slope: bool):
    """Logits (c, V) before their cap, targets (c, 1) -> the sum of -log softmax(cap(logits))[target], in
    fp32, and with `slope` its gradient for the logits, (c, V) in their dtype, else None."""
    z = cap(logits.float(), limit)
    logp = z.log_softmax(-1)
    loss = -logp.gather(1, targets).sum()
    if not slope:
        return loss, None
    one_hot = torch.arange(z.shape[1], device=z.device) == targets      # (c, V); unlike a scatter, it fuses
    g = logp.exp_().sub_(one_hot.byte())                # softmax - one-hot
    if limit:                                           # d cap(z) / dz = 1 - tanh(z / limit)^2
        g *= 1 - z.div_(limit).square_()
    return loss, g.to(logits.dtype)


def cross_entropy(x, weight, targets, limit: float | None = None, score=score):
    """Sum over tokens of -log softmax(cap(x W^T))[target], a scalar in fp32, without ever holding all logits.

    x (n, D) and weight (V, D) of one dtype, targets (n,) int64, limit: the soft cap on logits, or None.
    Nothing to score gives 0 with a graph. A weight that requires no gradient costs no buffer for one.
    """
    grads = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return FusedCrossEntropy.apply(x, weight, targets, limit, score, *grads)


class FusedCrossEntropy(torch.autograd.Function):
    """Chunks of tokens: logits by a product in the compute dtype, softmax in fp32, and the gradient at once,
    while the logits are there; backward only scales it. Three products in all, as in dense cross-entropy."""

    @staticmethod
    def forward(ctx, x, weight, targets, limit, score, x_grad, weight_grad):
        chunk, total = max(1, CHUNK // len(weight)), torch.zeros((), device=x.device)
        ctx.dx = torch.empty_like(x) if x_grad else None
        ctx.dw = torch.zeros_like(weight) if weight_grad else None
        for a in range(0, len(x), chunk):
            part, target = x[a:a + chunk], targets[a:a + chunk, None]                        # (c, D), (c, 1)
            loss, g = score(part @ weight.T, target, limit, x_grad or weight_grad)               # g: (c, V)
            total += loss
            if x_grad:
                torch.mm(g, weight, out=ctx.dx[a:a + chunk])
            if weight_grad:
                ctx.dw.addmm_(g.T, part)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dw = (None if d is None else d.mul_(scale) for d in (ctx.dx, ctx.dw))   # in place: they are large
        del ctx.dx, ctx.dw                              # so a second backward fails instead of scaling twice
        return dx, dw, None, None, None, None, None


# ------------------------------------------------------------------------------------------- which layers

@torch.no_grad()
def lens(model: Transformer, tokens: Tokens, places, ids):
    """The logit lens: the next-token distribution that W_out reads off every layer at the flat places (n,).
    Its entropy in nats, (L + 1, n), and the probabilities of ids (n, c), (L + 1, n, c); fp32, on the CPU."""
    h = model(tokens, tuple(range(model.config.num_layers + 1)))
    entropy, probability = torch.empty(len(h), len(places)), torch.empty(len(h), *ids.shape)
    for k in h:
        for part in torch.arange(len(places)).split(256):
            p = model.logits(h[k][places[part].to(h[k].device)]).softmax(-1)                    # (<= 256, V)
            entropy[k, part] = torch.special.entr(p).sum(-1).cpu()
            probability[k, part] = p.gather(1, ids[part].to(p.device)).cpu()
    return entropy, probability


def choose_layers(entropy: list):
    """Mean entropy after layers 0..L of target-language prompts -> (i, j, a phrase that says why).

    As the paper reads it: the first drop of the entropy ends with language conversion (i), the second begins
    where English thinking ends (j). A drop is a run of layers that each take off more than 5 % of the curve's
    range, and 15 % of it together. Without two separate drops, i and j are the paper's share of the depth:
    2/32 and 15/32.
    """
    L, span = len(entropy) - 1, max(entropy) - min(entropy)
    falls = [entropy[k - 1] - entropy[k] > 0.05 * span for k in range(1, L + 1)] + [False]
    drops, first = [], None
    for k, falling in enumerate(falls, 1):
        if falling and first is None:
            first = k
        elif not falling and first is not None:         # layers first..k-1 make it fall
            if entropy[first - 1] - entropy[k - 1] > 0.15 * span:
                drops.append((first, k - 1))
            first = None
    if len(drops) >= 2:
        (a, i), (b, c) = drops[:2]
        return i, b - 1, f"the entropy falls in layers {a}-{i} and again in {b}-{c}"
    return (max(1, round(2 / 32 * L)), max(1, round(15 / 32 * L)),
            f"the entropy has {len(drops)} clear drop{'s' * (not drops)} on this model, not two; these are "
            "the paper's 2/32 and 15/32 of the depth")
