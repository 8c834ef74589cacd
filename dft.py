"""dft.py: deep supervision fine-tuning (Huo et al., AAAI 2025, arXiv 2503.01275).

A parallel record has a target-language query and answer (x_tgt, y_tgt) and their English parallels
(x_en, y_en). Ordinary fine-tuning supervises only the top of the model. Deep supervision adds a
loss at a bottom layer i, where language conversion ends, and one at a middle layer j, where
thinking in English ends:

    L = L_TFT + w_LC L_LC + w_ET L_ET                                                         (1)
    L_TFT        = -log P(y_tgt | x_tgt; theta)                   target-language fine-tuning (2)
    L_LC logits  = -log P(x_en | x_tgt; theta_1:i, W_out)         language conversion         (3)
    L_ET logits  = -log P(y_en | x_tgt; theta_1:j, W_out)         English thinking            (4)
    L_LC feature = 1 - cos(h_i of the English query, h_i of the target-language query)        (5)
    L_ET feature = 1 - cos(h_L of the English answer, h_j of the target-language answer)      (6)

(The numbers are this file's.) W_out is the head; (3) and (4) use it but do not train it.

One forward pass computes (2), (3) and (4). A record is one row: the prompt P and three segments
that each continue P and do not see each other. A segment is dropped after it is scored:

    layers 1 .. i      P A Y X      X = x_en is scored at layer i
    layers i .. j      P A Y        Y = y_en is scored at layer j
    layers j .. L      P A          A = y_tgt is scored at layer L

An example, with words for token ids and without the template that is part of a real P:

    index      0      1        2      3      4      5      6     7         8
    id         法国    货币?    欧元    <eos>  euro   <eos>  The   currency  ?
    segment    P      P        A      A      Y      Y      X     X         X
    position   0      1        2      3      2      3      2     3         4

The last token of P predicts the first token of A, of Y and of X. So the states at indices 1, 2
predict A (2), those at 1, 4 predict Y (4), and those at 1, 6, 7 predict X (3).

Shapes are those of model.py. Every loss is a sum that is divided by the number of its own tokens
(or pairs) in the whole global batch, over micro-batches and ranks: every token weighs the same.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import InputError, Packed, Transformer, cap

TERMS = ("tft", "lc", "et")
CHUNK = 2 ** 25         # logits in memory at once: 128 MiB in fp32, 1,048 tokens of LLaMA-2


@dataclass(frozen=True)
class Method:
    """What is supervised, and where. The paper leaves the choices of the last four fields open."""
    lc: str = "logits"              # signal of language conversion: none | logits | feature
    et: str = "logits"              # signal of English thinking: none | logits | feature
    lc_layer: int = 0               # i, 1..L
    et_layer: int = 0               # j, i..L
    lc_weight: float = 1.0
    et_weight: float = 1.0
    align: str = "branch"           # logits: "branch" scores the English tokens one by one after
                                    # the prompt, as in (3) and (4); "position" reads English token
                                    # t off the state at target-language token t - 1
    pool: str = "mean"              # features: the mean over the tokens, or the "last" token
    lens_norm: bool = True          # logits: the final norm, frozen, precedes W_out at i and j
    english_grad: bool = False      # features: train the English side, else it is a fixed target

    def __post_init__(self):
        if len(self.signals()) == 2 and self.et_layer and self.lc_layer > self.et_layer:
            raise InputError(f"lc_layer {self.lc_layer} is above et_layer {self.et_layer}")

    def signals(self) -> dict:
        """{"lc" or "et": its signal} of the inner losses in use."""
        both = {"lc": self.lc, "et": self.et}
        return {term: signal for term, signal in both.items() if signal != "none"}

    def layer(self, term: str) -> int:
        return self.lc_layer if term == "lc" else self.et_layer

    def weight(self, term: str) -> float:
        return {"tft": 1.0, "lc": self.lc_weight, "et": self.et_weight}[term]


# ---------------------------------------------------------------------------------- the layout

@dataclass
class Batch:
    """Records laid out for one forward pass."""
    packed: Packed
    english: Packed     # English prompts and answers, for feature losses; may be empty
    losses: dict        # {term: a pair for each record}; logits: (indices that predict, ids that
                        # they predict); features: (indices to pool, English indices to pool)
    counts: dict        # {term: the number of ids that are predicted, or of pairs}
    tokens: int         # all that enter the model


def lay_out(records: list, method: Method, L: int) -> Batch:
    """data.Records -> Batch for a model of L layers. One without an English side has only (2)."""
    packed, english, signals = Packed(), Packed(), method.signals()
    losses = {"tft": [], **{term: [] for term in signals}}
    for record in records:
        prompt = packed.add(record.prompt, depth=L)
        answer = packed.add(record.answer, depth=L, after=prompt)
        # The state of a token predicts the next one.
        losses["tft"].append(([index - 1 for index in answer], record.answer))
        if record.query_en is None:
            continue
        query = prompt[slice(*record.query)]        # the query without its template
        if "feature" in signals.values():
            depth = L if method.et == "feature" else method.lc_layer
            prompt_en = english.add(record.prompt_en, depth)
            parallel = {"lc": prompt_en[slice(*record.prompt_en_query)]}
        if method.et == "feature":
            parallel["et"] = english.add(record.answer_en, depth, after=prompt_en)
        for term, ours, ids in (("et", answer, record.answer_en), ("lc", query, record.query_en)):
            signal = signals.get(term)
            if signal == "feature":
                losses[term].append((ours, parallel[term]))
            elif signal == "logits" and method.align == "branch":       # the segments Y and X
                segment = packed.add(ids, method.layer(term), after=prompt)
                losses[term].append(([prompt[-1], *segment][:len(ids)], ids))
            elif signal == "logits":
                n = min(len(ours), len(ids))
                losses[term].append(([index - 1 for index in ours[:n]], ids[:n]))
    if "feature" in signals.values() and not len(english):
        english.add(records[0].prompt[:1], depth=L)     # FSDP: each rank makes an English pass
    counts = {}
    for term, pairs in losses.items():
        is_feature = signals.get(term) == "feature"
        counts[term] = len(pairs) if is_feature else sum(len(ids) for _, ids in pairs)
    return Batch(packed, english, losses, counts, len(packed) + len(english))


# ---------------------------------------------------------------------------------- the losses

class DFT(nn.Module):
    """A model and a method. Use only forward(): under FSDP the head is whole only inside it."""

    def __init__(self, model: Transformer, method: Method):
        super().__init__()
        self.model, self.method, self.score = model, method, score

    def compile_parts(self, flex: bool) -> None:
        """Use torch.compile for the layers and the loss; see Transformer.compile_layers."""
        self.model.compile_layers(flex)
        self.score = torch.compile(score, dynamic=True)

    def forward(self, batch: Batch) -> dict:
        """{term: the sum of its losses, a scalar in fp32}; for a tuple, lens() of its items."""
        if isinstance(batch, tuple):            # used before training, to choose layers
            return lens(self.model, *batch)
        method, L = self.method, self.model.config.num_hidden_layers
        signals = method.signals()
        h = self.model(batch.packed, (L, *(method.layer(term) for term in signals)))
        if len(batch.english):
            layers_en = {"lc": method.lc_layer, "et": L}
            used = tuple(layers_en[term] for term in signals if signals[term] == "feature")
            with torch.set_grad_enabled(method.english_grad and torch.is_grad_enabled()):
                h_en = self.model(batch.english, used)
        sums = {"tft": self.predict(h[L], L, batch, "tft")}                                 # (2)
        for term, signal in signals.items():
            layer = method.layer(term)
            if signal == "logits":
                sums[term] = self.predict(h[layer], layer, batch, term)                # (3), (4)
                continue
            x_en = h_en[layers_en[term]]
            if term == "et":                    # h_L as transformers returns it: after the norm
                x_en = self.model.norm(x_en, frozen=True)
            ours = [indices for indices, _ in batch.losses[term]]
            english = [indices for _, indices in batch.losses[term]]
            a = pool(x_en, batch.english, layers_en[term], english, method.pool)   # (pairs, D)
            b = pool(h[layer], batch.packed, layer, ours, method.pool)              # (pairs, D)
            sums[term] = (1 - F.cosine_similarity(a, b, dim=-1)).sum()                 # (5), (6)
        return sums

    def predict(self, x, layer: int, batch: Batch, term: str):
        """-log P, summed, of a logits loss, from the residual stream x (N_k, D) after `layer`."""
        indices, ids = [], []
        for one_indices, one_ids in batch.losses[term]:
            indices += one_indices
            ids += one_ids
        x = x.index_select(0, batch.packed.index(indices, layer).to(x.device))      # (n, D)
        inner = term != "tft"
        if self.method.lens_norm or not inner:
            x = self.model.norm(x, frozen=inner)
        weight = self.model.head_weight.detach() if inner else self.model.head_weight
        target = torch.tensor(ids, dtype=torch.long, device=x.device)
        limit = self.model.config.final_logit_softcapping
        return cross_entropy(x, weight.to(x.dtype), target, limit, self.score)


def pool(x, packed: Packed, layer: int, texts: list, how: str = "mean"):
    """Pooled states of texts, (texts, D) in fp32, from the stream x (N_k, D) after `layer`.

    texts: the flat indices of the tokens of each; how: the "mean" of their states or the "last"."""
    texts = [indices[-1:] if how == "last" else indices for indices in texts]
    indices, text = [], []
    for n, one in enumerate(texts):
        indices += one
        text += [n] * len(one)
    states = x.index_select(0, packed.index(indices, layer).to(x.device)).float()   # (n, D)
    count = torch.tensor([len(one) for one in texts], device=x.device)[:, None]      # (texts, 1)
    total = states.new_zeros(len(texts), x.shape[1])
    return total.index_add(0, torch.tensor(text, dtype=torch.long, device=x.device), states) / count


def score(logits, target, limit: float | None, with_grad: bool):
    """Logits (c, V) before their cap, target (c, 1) -> the sum of -log softmax(cap(logits))[target]
    in fp32, and its gradient for the logits, (c, V) in their dtype, or None."""
    z = cap(logits.float(), limit)
    logp = z.log_softmax(-1)
    loss = -logp.gather(1, target).sum()
    if not with_grad:
        return loss, None
    one_hot = torch.arange(z.shape[1], device=z.device) == target   # (c, V); a scatter cannot fuse
    g = logp.exp_().sub_(one_hot.byte())                            # softmax - one-hot
    if limit:                                                       # d cap(z) / dz = 1 - tanh^2
        g *= 1 - z.div_(limit).square_()
    return loss, g.to(logits.dtype)


def cross_entropy(x, weight, target, limit: float | None = None, score=score):
    """The sum over n tokens of -log softmax(cap(x W^T))[target], a scalar in fp32.

    x (n, D) and weight (V, D) of one dtype, target (n,) int64, limit: the soft cap or None. All n
    logits are never in memory at once. With n = 0 the result is a differentiable 0.
    """
    x_grad = torch.is_grad_enabled() and x.requires_grad
    weight_grad = torch.is_grad_enabled() and weight.requires_grad
    return FusedCrossEntropy.apply(x, weight, target, limit, score, x_grad, weight_grad)


class FusedCrossEntropy(torch.autograd.Function):
    """For each chunk of tokens: logits in the compute dtype, softmax in fp32, and the gradient
    while the logits are in memory. Backward only scales it. Three products, as in dense form."""

    @staticmethod
    def forward(ctx, x, weight, target, limit, score, x_grad, weight_grad):
        chunk, total = max(1, CHUNK // len(weight)), torch.zeros((), device=x.device)
        ctx.dx = torch.empty_like(x) if x_grad else None
        ctx.dw = torch.zeros_like(weight) if weight_grad else None
        for begin in range(0, len(x), chunk):
            part = x[begin:begin + chunk]                                           # (c, D)
            ids = target[begin:begin + chunk, None]                                 # (c, 1)
            loss, g = score(part @ weight.T, ids, limit, x_grad or weight_grad)     # g: (c, V)
            total += loss
            if x_grad:
                torch.mm(g, weight, out=ctx.dx[begin:begin + chunk])
            if weight_grad:
                ctx.dw.addmm_(g.T, part)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx = None if ctx.dx is None else ctx.dx.mul_(scale)         # in place, as they are large
        dw = None if ctx.dw is None else ctx.dw.mul_(scale)
        del ctx.dx, ctx.dw                      # a second backward fails instead of scaling twice
        return dx, dw, None, None, None, None, None


# -------------------------------------------------------------------------------- which layers

@torch.no_grad()
def lens(model: Transformer, packed: Packed, indices: list, ids):
    """The logit lens: the next-token distributions that W_out gives after layers 0..L at n indices.

    Returns their entropy in nats, (L + 1, n), and the probabilities of ids (n, c), (L + 1, n, c);
    both in fp32 on the CPU.
    """
    h = model(packed, tuple(range(model.config.num_hidden_layers + 1)))
    entropy, probability = torch.empty(len(h), len(indices)), torch.empty(len(h), *ids.shape)
    for k, x in h.items():
        for part in torch.arange(len(indices)).split(256):          # bounds the logits in memory
            index = torch.tensor(indices)[part].to(x.device)
            p = model.logits(x[index]).softmax(-1)                                   # (<= 256, V)
            entropy[k, part] = torch.special.entr(p).sum(-1).cpu()
            probability[k, part] = p.gather(1, ids[part].to(p.device)).cpu()
    return entropy, probability


def choose_layers(entropy: list):
    """Mean lens entropy after layers 0..L on target-language queries -> (i, j, why, a phrase).

    As the paper reads it: the first drop of the entropy ends with language conversion (i), the
    second begins where English thinking ends (j). A drop is a run of layers that each lower the
    entropy by more than 5 % of its range, and together by 15 %. Without two drops (SmolLM2 shows
    none), i and j are the paper's shares of the depth, 2/32 and 15/32.
    """
    L, span = len(entropy) - 1, max(entropy) - min(entropy)
    drops, first = [], None                     # (first, last) layer of each drop
    for k in range(1, L + 2):
        falls = k <= L and entropy[k - 1] - entropy[k] > 0.05 * span
        if falls and first is None:
            first = k
        elif not falls and first is not None:
            if entropy[first - 1] - entropy[k - 1] > 0.15 * span:
                drops.append((first, k - 1))
            first = None
    if len(drops) >= 2:
        (a, i), (b, c) = drops[:2]
        return i, b - 1, f"the entropy falls in layers {a}-{i} and again in {b}-{c}"
    why = f"the entropy has {len(drops)} clear drops, not two; the paper's 2/32 and 15/32 of L"
    return max(1, round(2 / 32 * L)), max(1, round(15 / 32 * L)), why
