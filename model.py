"""model.py: what a LLaMA or Gemma-2 decoder is. It knows nothing of training, of data or of the method.

Shapes, in every file of this project:
    N  tokens of all rows, laid end to end (there is no padding)      V  vocabulary
    R  rows        T  tokens of one row                               L  layers
    D  hidden size H  query heads   K  key/value heads   h  head size

Everything that is token-wise (norms, projections, MLP, head) works on flat (N, D) tensors; attention alone
needs to know where a row begins, and which tokens of it may see each other (class Tokens).

Dtypes: weights keep the dtype they are held in (fp32 when training) and act in `compute_dtype` (bf16, fp32);
norms, softmax and logits are computed in fp32. Modules bear Hugging Face's names, so no table is needed.
"""
import json
import math
import os
import shutil
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint


class InputError(Exception):
    """A user's mistake, in one line: what was found where, what was expected, what to do. Exit code 2."""

    def __str__(self):      # what it quotes from a file may be endless, or hold line ends and terminal codes
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return text if len(text) < 1000 else f"{text[:600]} ... {text[-300:]}"


# ------------------------------------------------------------------------------------------- configuration

# What transformers assumes where config.json is silent (it writes only what differs from these).
DEFAULTS = {
    "llama": dict(rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, bos_token_id=1,
                  eos_token_id=2, tie_word_embeddings=False, hidden_act="silu"),
    "gemma2": dict(rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=8192, bos_token_id=2,
                   eos_token_id=1, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
                   head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
                   attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
}
# Fields that would change the mathematics, with the values under which they do not.
HARMLESS = {
    "attention_bias": (False, None), "mlp_bias": (False, None), "attention_dropout": (0, None),
    "quantization_config": (None,), "partial_rotary_factor": (1, None), "pretraining_tp": (1, None),
    "use_bidirectional_attention": (False, None), "qk_norm": (False, None), "num_local_experts": (None,),
}


@dataclass
class Config:
    """A decoder, read from a Hugging Face config.json. Families are fields of it, not models of their own."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None       # LLaMA-3.1's stretching of the long wavelengths
    max_positions: int
    tie_embeddings: bool            # the head is the embedding matrix
    attn_scale: float               # on q.k: 1/sqrt(h), or Gemma-2's 1/sqrt(query_pre_attn_scalar)
    attn_cap: float | None          # cap * tanh(score / cap), Gemma-2: 50
    final_cap: float | None         # the same on logits, Gemma-2: 30
    windows: tuple                  # per layer: how far back a token sees, None for all the way
    gemma: bool                     # (1 + w) norms, two more of them a layer, scaled embeddings, GeGLU
    bos_id: int
    eos_ids: tuple                  # the first is the one that training teaches
    raw: dict                       # config.json as it was read, for save()
    folder: str                     # where it was read

    @classmethod
    def read(cls, folder: str) -> "Config":
        """The Config of folder/config.json; InputError for a file or a model that we cannot read."""
        path = os.path.join(folder, "config.json")
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise InputError(f"{path}: found a {type(raw).__name__}, expected a JSON object")
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in DEFAULTS:
            raise InputError(f"{path}: model_type is {family!r}, expected one of {', '.join(DEFAULTS)}")
        c, gemma = {**DEFAULTS[family], **raw}, family == "gemma2"
        try:
            rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}   # transformers 4, 5
            kind = rope.get("rope_type", rope.get("type", "default"))
            act = (c.get("hidden_activation") or c.get("hidden_act")) if gemma else c["hidden_act"]
            refused = [f"{k}={c[k]!r}" for k, fine in HARMLESS.items() if k in c and c[k] not in fine]
            refused += [f"rope type {kind!r}"] if kind not in ("default", "llama3") else []
            refused += [f"activation {act!r}"] if act != ("gelu_pytorch_tanh" if gemma else "silu") else []
            refused += ["sliding_window"] if c.get("sliding_window") and not gemma else []
            refused += [f"layer type {k!r}" for k in c.get("layer_types") or ()
                        if k not in ("sliding_attention", "full_attention")]
            if refused:
                raise InputError(f"{path}: needs {', '.join(refused)}, which is not implemented here")
            layers, heads = whole(c, "num_hidden_layers"), whole(c, "num_attention_heads")
            head_dim = whole(c, "head_dim") if c.get("head_dim") else whole(c, "hidden_size") // heads
            kinds = c.get("layer_types") or ["sliding_attention", "full_attention"] * layers
            eos = c["eos_token_id"]
            config = cls(
                model_type=family, vocab_size=whole(c, "vocab_size"), hidden_size=whole(c, "hidden_size"),
                intermediate_size=whole(c, "intermediate_size"), num_layers=layers, num_heads=heads,
                num_kv_heads=whole(c, "num_key_value_heads") if c.get("num_key_value_heads") else heads,
                head_dim=head_dim, norm_eps=float(c["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta", c["rope_theta"])),
                rope_scaling=None if kind == "default" else {key: float(rope[key]) for key in (
                    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")},
                max_positions=whole(c, "max_position_embeddings"),
                tie_embeddings=bool(c["tie_word_embeddings"]),
                attn_scale=float(c["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
                attn_cap=c.get("attn_logit_softcapping"), final_cap=c.get("final_logit_softcapping"),
                windows=tuple(whole(c, "sliding_window") if gemma and kind == "sliding_attention" else None
                              for kind in (kinds[k] for k in range(layers))),
                gemma=gemma, bos_id=int(c["bos_token_id"]),
                eos_ids=tuple(map(int, eos if isinstance(eos, list) else [eos])), raw=raw, folder=folder)
            numbers = (config.norm_eps, config.rope_theta, config.attn_scale, config.attn_cap,
                       config.final_cap, *(config.rope_scaling or {}).values())
            if not all(n is None or 0 < n < 1e30 for n in numbers):             # nor NaN, nor a complex root
                raise ValueError(f"the epsilon, theta, scale or a cap of {numbers} is no positive number")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
            raise InputError(f"{path}: a key is missing or wrong: {type(error).__name__} {error}") from None
        if heads % config.num_kv_heads or head_dim % 2 or not head_dim or not config.eos_ids:
            raise InputError(f"{path}: {heads} heads over {config.num_kv_heads} key/value heads of "
                             f"size {head_dim}, end tokens {config.eos_ids}: expected whole groups, an even "
                             "size, and an end token")
        if not all(0 <= i < config.vocab_size for i in (config.bos_id, *config.eos_ids)):
            raise InputError(f"{path}: bos_token_id or eos_token_id is negative or beyond vocab_size")
        return config


def whole(c: dict, key: str) -> int:
    """c[key], a positive whole number of a sane size (the bytes of a product of three must fit 63 bits)."""
    limit = {"num_hidden_layers": 2 ** 10, "max_position_embeddings": 2 ** 31}.get(key, 2 ** 20)
    if type(c[key]) is not int or not 0 < c[key] < limit:
        raise ValueError(f"{key} is {c[key]!r}, expected a positive whole number below {limit}")
    return c[key]


def read_json(path: str):
    """The JSON value in a file; InputError where it is missing or malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


# ------------------------------------------------------------------------------------------- tokens of a pass

class Tokens:
    """The tokens of one forward pass: rows laid end to end, each a trunk with branches.

    rows  R lists of segments (ids, depth). Segment 0 is the trunk; each later segment is a branch that
          continues the trunk: its positions go on where the trunk ends, and it sees the trunk and its own
          earlier tokens, never another branch. A token of depth d takes part in layers 1..d and then leaves.

    ids, pos, row, seg, depth: (N,) int64 on the CPU. starts[r][s]: the place where segment s of row r begins.
    """

    def __init__(self, rows: list):
        ids, pos, row, seg, depth, self.starts = [], [], [], [], [], []
        for r, segments in enumerate(rows):
            self.starts.append([])
            for s, (piece, d) in enumerate(segments):
                assert d <= segments[0][1], "a branch cannot outlive its trunk"
                self.starts[r].append(len(ids))
                first = len(segments[0][0]) if s else 0
                ids += piece
                pos += range(first, first + len(piece))
                row += [r] * len(piece)
                seg += [s] * len(piece)
                depth += [d] * len(piece)
        self.ids, self.pos, self.row, self.seg, self.depth = (
            torch.tensor(t, dtype=torch.long) for t in (ids, pos, row, seg, depth))

    @classmethod
    def plain(cls, rows: list, depth: int) -> "Tokens":
        """Rows of ids without branches, all of them `depth` layers deep."""
        return cls([[(ids, depth)] for ids in rows])

    def at(self, places, layer: int):
        """Flat places (n,) -> their places among the tokens that are still in the stream after `layer`."""
        return ((self.depth >= layer).cumsum(0) - 1)[places]


class Stage:
    """What the layers from `first` up to the next exit need to know of the tokens that pass through them.

    For attention they are strands. A row's first strand is its trunk and the first of its branches, one
    causal sequence; every other branch is a strand that sees the `trunks` first tokens of that one, and
    itself. So no score is computed that a mask would then strike out. With `flex` they are one sequence of
    all rows, and `masks` says which blocks of it are computed (see block_mask)."""

    def __init__(self, tokens: Tokens, first: int, config: Config, device, cache=None, flex=False):
        self.keep = (tokens.depth >= first).nonzero().squeeze(1)            # (n,) flat places, on the CPU
        pos, row, seg = (t[self.keep] for t in (tokens.pos, tokens.row, tokens.seg))
        self.cos, self.sin = rotation(config, pos, device)                  # (n, 1, h) each
        self.cache, self.sizes, self.trunks = cache, [], []                 # the latter of each strand
        if flex:
            self.masks = {window: block_mask(pos, row, seg, window, device)
                          for window in set(config.windows)}                # window -> a mask for all rows
            return
        for r in row.unique():
            trunk, *branches = torch.unique_consecutive(seg[row == r], return_counts=True)[1].tolist()
            self.sizes += [trunk + sum(branches[:1]), *branches[1:]]
            self.trunks += [0] + [trunk] * len(branches[1:])
        self.masks = {window: [strand_mask(trunk, size, window, device)
                               for trunk, size in zip(self.trunks, self.sizes)]
                      for window in set(config.windows)}                    # window -> a mask for each strand
        self.pos = pos.to(device)
        if cache is not None:                                               # which prompt's keys they are
            self.slot = (cache.first[row] + (seg - 1).clamp(min=0)).to(device)


def strand_mask(trunk: int, size: int, window, device):
    """(size, trunk + size) bool, True where a query (row) sees a key (column), which both go on where the
    trunk ends; None stands for plain causal attention, which needs no mask."""
    if not trunk and (window is None or size <= window):
        return None
    back = torch.arange(trunk, trunk + size)[:, None] - torch.arange(trunk + size)      # how far a key lies
    return ((back >= 0) & (back < (window or torch.inf))).to(device)


def block_mask(pos, row, seg, window, device) -> BlockMask:
    """Which of n tokens of positions, rows and segments (n,) see which, for FlexAttention: 128 x 128 blocks
    to compute, and the rule within them. The tokens are padded to a power of two, so that few sizes occur and
    soon no kernel is compiled anew; each that is added is a row of its own."""
    n, size, block = len(pos), max(128, 1 << (len(pos) - 1).bit_length()), 128
    row = torch.cat((row, torch.arange(-size, -n)))
    pos, seg = (F.pad(t, (0, size - n)) for t in (pos, seg))
    counts = torch.unique_consecutive(row, return_counts=True)[1]
    begin = (counts.cumsum(0) - counts).repeat_interleave(counts)           # where each token's row begins
    # A block of queries needs the blocks of keys from where its first query's row begins up to itself: so
    # many of them, and which; what stands behind those in a line is not read.
    last = torch.arange(size // block)
    low = begin[::block] // block
    needed, which = last - low + 1, torch.minimum(low[:, None] + last, last[:, None])   # (b,), (b, b)
    pos, row, seg = (t.to(device) for t in (pos, row, seg))

    def sees(batch, head, query, key):
        back = pos[query] - pos[key]
        return (row[query] == row[key]) & ((seg[key] == 0) | (seg[key] == seg[query])) & (
            key <= query) & (back < (window or size))
    return BlockMask.from_kv_blocks(*(t[None, None].int().to(device) for t in (needed, which)),
                                    BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(size, size))


def rotation(config: Config, pos, device):
    """RoPE (Su et al. 2021) for positions (n,): cos and sin, each (n, 1, h) in fp32."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling:    # LLaMA-3.1: wavelengths beyond the first context are stretched, with a ramp
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        freq = freq * ramp + freq / s["factor"] * (1 - ramp)
    angle = (pos[:, None].float() * freq).repeat(1, 2)[:, None]             # (n, 1, h): the halves turn alike
    return angle.cos().to(device), angle.sin().to(device)


# ------------------------------------------------------------------------------------------- the decoder

class Transformer(nn.Module):
    """The decoder. `compute_dtype` None means the dtype of the weights themselves."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.compute_dtype, self.flex = config, None, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, k) for k in range(config.num_layers))
        self.norm = RMSNorm(config)
        if not config.tie_embeddings:   # a tied head is no parameter of its own: nothing can come untied
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self):
        """W_out, (V, D)."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tokens, taps: tuple, cache=None) -> dict:
        """{k: the residual stream after layer k, (N_k, D) in the compute dtype} for each k of taps.

        0 is the embeddings, L the stream before the final norm. N_k counts the tokens whose depth is at least
        k, in their order in `tokens` (Tokens.at translates places). No layer above max(taps) is run.
        """
        x = self.embed(tokens.ids)                                          # (N, D)
        out = {0: x} if 0 in taps else {}
        top, below = max(taps), 0
        for last in sorted({d for d in tokens.depth.tolist() if 0 < d < top} | ({top} - {0})):
            stage = Stage(tokens, below + 1, self.config, x.device, cache, self.flex)
            if len(stage.keep) < len(x):                    # those whose depth is reached leave the stream
                x = x[tokens.at(stage.keep, below).to(x.device)]
            for k in range(below + 1, last + 1):
                x = self.layers[k - 1](x, stage)            # (N_k, D)
                if k in taps:
                    out[k] = x
            below = last
        return out

    def compile_layers(self, flex: bool) -> None:
        """Let torch.compile fuse what is element by element, and with `flex` (GPUs: it has no backward on
        CPUs) FlexAttention do all rows at once. One compilation serves all layers and numbers of tokens;
        attention stays outside of it, for strands and masks differ from batch to batch."""
        torch._dynamo.config.recompile_limit = 64           # kinds of layers, gradient or not, masks' sizes
        self.flex = flex
        attend = torch.compile(flex_attention, dynamic=False) if flex else None
        for layer in self.layers:
            layer.self_attn.flex_attention = attend
            layer.self_attn.attend = torch.compiler.disable(layer.self_attn.attend)
            layer.block = torch.compile(layer.block, dynamic=True)

    def embed(self, ids):
        """Token ids (N,) -> (N, D) in the compute dtype."""
        x = self.embed_tokens(ids.to(self.embed_tokens.weight.device))
        x = x.to(self.compute_dtype or x.dtype)
        return x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype) if self.config.gemma else x

    def logits(self, x):
        """Residual stream (n, D) -> logits (n, V) in fp32: final norm, head, cap."""
        x = self.norm(x)
        return cap(F.linear(x, self.head_weight.to(x.dtype)).float(), self.config.final_cap)


class Layer(nn.Module):
    """One block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.gemma = config.gemma
        self.checkpointing = False      # True: keep the input only, and compute the layer again in backward
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        if self.gemma:
            self.pre_feedforward_layernorm = RMSNorm(config)
            self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x, stage: Stage):                                     # (n, D) -> (n, D)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.block, x, stage, use_reentrant=False)
        return self.block(x, stage)

    def block(self, x, stage: Stage):
        if self.gemma:                  # here post_attention_layernorm is, as its name says, after attention
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), stage))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), stage)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.config, self.index, self.window = config, index, config.windows[index]
        self.flex_attention = flex_attention            # or compiled; as it is, it holds all scores
        D, H, K, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj, self.o_proj = Linear(D, H * h), Linear(H * h, D)
        self.k_proj, self.v_proj = Linear(D, K * h), Linear(D, K * h)

    def forward(self, x, stage: Stage):                                     # (n, D) -> (n, D)
        c = self.config
        q = rotate(self.q_proj(x).view(-1, c.num_heads, c.head_dim), stage)         # (n, H, h)
        k = rotate(self.k_proj(x).view(-1, c.num_kv_heads, c.head_dim), stage)      # (n, K, h)
        v = self.v_proj(x).view(-1, c.num_kv_heads, c.head_dim)                     # (n, K, h)
        return self.o_proj(self.attend(q, k, v, stage).reshape(len(x), -1))

    def attend(self, q, k, v, stage: Stage):
        """q (n, H, h), k and v (n, K, h) of all rows -> (n, H, h)."""
        c, masks, n = self.config, stage.masks[self.window], len(q)
        if stage.cache is not None:
            stage.cache.put(self.index, stage, k, v)
        if isinstance(stage, Step):     # one new token a row, against all that the cache holds of that row
            k, v = (t[self.index, :, :, :stage.size] for t in (stage.cache.k, stage.cache.v))
            return attend(q[:, :, None], k, v, masks, c)    # q (R, H, 1, h), k and v (R, K, S, h)
        if isinstance(masks, BlockMask):                    # a GPU in training: all rows at once
            def capped(score, batch, head, query, key):
                return cap(score, c.attn_cap)
            q, k, v = (F.pad(t.transpose(0, 1)[None], (0, 0, 0, masks.shape[-1] - n)) for t in (q, k, v))
            out = self.flex_attention(q, k, v, capped if c.attn_cap else None, masks, c.attn_scale,
                                      enable_gqa=q.shape[1] != k.shape[1])
            return out[0, :, :n].transpose(0, 1)
        # Strand by strand: no padding, and no token sees another row. CPUs are faster at it in fp32.
        dtype, wide = q.dtype, torch.float32 if q.device.type == "cpu" else q.dtype
        out, strands = [], (t.transpose(0, 1)[None].to(wide).split(stage.sizes, dim=2) for t in (q, k, v))
        for q, k, v, trunk, mask in zip(*strands, stage.trunks, masks):                 # (1, H or K, T, h)
            if trunk:
                k, v = (torch.cat((whole[:, :, :trunk], t), 2) for whole, t in zip(first, (k, v)))
            else:
                first = k, v
            out.append(attend(q, k, v, mask, c))
        return torch.cat(out, dim=2)[0].transpose(0, 1).to(dtype)


def rotate(x, stage: Stage):
    """Turn each head (n, heads, h) by its token's angles; the two halves of h are the two coordinates."""
    a, b = x.chunk(2, dim=-1)
    return x * stage.cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * stage.sin.to(x.dtype)


def attend(q, k, v, mask, config: Config):
    """q (B, H, T, h), k and v (B, K, S, h) -> (B, H, T, h). mask: bool for (B, H, T, S), or None: causal."""
    if config.attn_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              scale=config.attn_scale, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = cap((q @ k.transpose(2, 3)).float() * config.attn_scale, config.attn_cap)          # (B, H, T, S)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def cap(x, limit: float | None):
    """Gemma-2's soft cap: limit * tanh(x / limit), elementwise."""
    return x if limit is None else limit * torch.tanh(x / limit)


class MLP(nn.Module):
    """Gated MLP: SwiGLU (LLaMA) or GeGLU with the tanh GELU (Gemma-2)."""

    def __init__(self, config: Config):
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gemma = config.gemma
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, M), Linear(D, M), Linear(M, D)

    def forward(self, x):                                                   # (n, D) -> (n, D)
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * w in fp32; Gemma-2 stores w - 1. frozen: the weight gets no gradient."""

    def __init__(self, config: Config):
        super().__init__()
        self.offset, self.eps = float(config.gemma), config.norm_eps
        self.weight = nn.Parameter(torch.full((config.hidden_size,), 1.0 - self.offset))

    def forward(self, x, frozen: bool = False):                             # (n, D) -> (n, D)
        w = self.weight.detach() if frozen else self.weight
        w = w.to(x.dtype).float() + self.offset     # through the compute dtype, as a sharded model holds it
        return F.rms_norm(x.float(), w.shape, w, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A linear map without bias, in the dtype of its input (its weight may be an fp32 master copy)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# ------------------------------------------------------------------------------------------- generation

class Cache:
    """Keys and values of R prompts for generation: (L, R, K, S, h) each, every prompt at its own positions.
    While prompts are read, those that begin alike are one row (see decode): its trunk is stored with the
    first of them, its branches with one each; `first` holds the first prompt of each row."""

    def __init__(self, config: Config, rows: int, size: int, first, device, dtype):
        shape = (config.num_layers, rows, config.num_kv_heads, size, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.first = first                                                  # (rows of Tokens,)

    def put(self, layer: int, stage: Stage, k, v):
        """Store k and v (n, K, h) of one layer where the stage's tokens belong."""
        self.k[layer, stage.slot, :, stage.pos], self.v[layer, stage.slot, :, stage.pos] = k, v

    def keep(self, rows):
        """Drop all prompts but these (n,)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Step(Stage):
    """The stage of one decoding step: one token of each of R rows, at positions pos (R,)."""

    def __init__(self, pos, config: Config, cache: Cache):
        self.slot, self.pos, self.cache, self.size = torch.arange(len(pos)), pos, cache, int(pos.max()) + 1
        self.cos, self.sin = rotation(config, pos, cache.k.device)
        back = pos[:, None] - torch.arange(self.size)                    # (R, S): how far back each key lies
        self.masks = {window: ((back >= 0) & (back < (window or torch.inf)))[:, None, None].to(cache.k.device)
                      for window in set(config.windows)}                    # (R, 1, 1, S)


def generate(model: Transformer, prompts: list, max_new_tokens: int, stop=(), last=()) -> list:
    """Greedy continuations of R prompts (lists of ids), each a list of at most max_new_tokens ids.

    A row ends before one of the ids in `stop` (default: the model's end tokens), behind one of the ids in
    `last`, or when the model's last position is taken.
    """
    out = [[] for _ in prompts]
    for step in decode(model, prompts, max_new_tokens, stop, last):
        for r, token in step:
            out[r].append(token)
    return out


@torch.no_grad()
def decode(model: Transformer, prompts: list, max_new_tokens: int, stop=(), last=()):
    """generate(), a step at a time: yields [(prompt, its next id)]. Neighbours that begin alike are one row
    while they are read, a trunk with branches, so that what they share is computed once; prompts that are
    finished leave the batch."""
    c, device = model.config, model.embed_tokens.weight.device
    lengths, stop, L = [len(p) for p in prompts], set(stop or c.eos_ids), c.num_layers
    if not all(0 < n < c.max_positions for n in lengths):
        raise InputError(f"a prompt has {max(lengths)} tokens and one {min(lengths)}; this model takes 1 to "
                         f"{c.max_positions - 1}")
    if not prompts:
        return
    runs = alike(prompts)
    tokens = Tokens([[(prompts[group[0]][:n], L), *((prompts[r][n:], L) for r in group)]
                     for group, n in runs])
    ends = [start + lengths[r] - n - 1 for (group, n), starts in zip(runs, tokens.starts)
            for r, start in zip(group, starts[1:])]                         # the last token of each prompt
    size = min(max(lengths) + max_new_tokens, c.max_positions)
    cache = Cache(c, len(prompts), size, torch.tensor([group[0] for group, _ in runs]), device,
                  model.compute_dtype or model.embed_tokens.weight.dtype)
    x = model(tokens, (L,), cache)[L][torch.tensor(ends, device=device)]                            # (R, D)
    for group, n in runs:
        for kept in (cache.k, cache.v):
            kept[:, group[1:], :, :n] = kept[:, group[:1], :, :n]
    alive, pos, done = list(range(len(prompts))), torch.tensor(lengths), 0
    while alive and done < max_new_tokens:
        new, done = model.logits(x).argmax(-1), done + 1                                            # (R,)
        said = [(slot, r, t) for slot, (r, t) in enumerate(zip(alive, new.tolist())) if t not in stop]
        yield [(r, t) for _, r, t in said]
        going = [slot for slot, r, t in said if t not in last and lengths[r] + done < size]
        if len(going) < len(alive):
            alive, new, pos = [alive[slot] for slot in going], new[going], pos[going]
            cache.keep(going)
        if alive and done < max_new_tokens:
            stage, x = Step(pos, c, cache), model.embed(new)
            for layer in model.layers:
                x = layer(x, stage)                                         # (R, D)
            pos = pos + 1


def alike(prompts: list) -> list:
    """Runs of neighbours that begin alike: [(their places, how many ids they share)], each as long as what
    they share is longer than what follows it in all of them."""
    runs = []
    for r, prompt in enumerate(prompts):
        group = runs[-1][0] + [r] if runs else [r]
        n = min(len(os.path.commonprefix([prompts[g] for g in group])), len(prompt) - 1)
        if runs and n > sum(len(prompts[g]) - n for g in group):
            runs[-1] = group, n
        else:
            runs.append(([r], len(prompt)))
    return runs


# ------------------------------------------------------------------------------------------- weights

CARRIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "vocab.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "generation_config.json")
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load(folder: str, dtype=torch.float32, device="cpu") -> Transformer:
    """The model of a Hugging Face folder, its weights held in dtype. Peak memory: the weights and 16 MiB."""
    with torch.device("meta"):
        model = Transformer(Config.read(folder)).to(dtype)
    fitting(model, folder)                                              # before anything is allocated
    return fill(model.to_empty(device=device), folder)


def fitting(model: Transformer, folder: str):
    """The safetensors of a folder as weight_files() tells them, and the model's parameters by their names in
    there. InputError names missing, unexpected, mis-shaped and unreadable tensors."""
    found = weight_files(folder)                                        # tensor name -> (file, shape, dtype)
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    extra = {n for n in found if n not in wanted and not n.endswith("rotary_emb.inv_freq")}    # an old buffer
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_embeddings and head in extra and same(found, head, embedding):
        extra.remove(head)                                                # a tied head, written out once more
    wrong = [f"missing {n}" for n in wanted if n not in found] + [f"unexpected {n}" for n in sorted(extra)]
    for n, p in wanted.items():
        _, shape, kind = found.get(n, (None, list(p.shape), "F32"))
        wrong += [f"{n} is {shape}, expected {list(p.shape)}"] if shape != list(p.shape) else []
        wrong += [f"{n} is {kind}, expected floats"] if kind not in FLOATS.values() else []
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{folder}: the weights do not fit config.json: {'; '.join(wrong[:5])}{more}")
    return found, wanted


def fill(model: Transformer, folder: str) -> Transformer:
    """Copy the safetensors weights of a folder into a model's parameters, plain or sharded (a rank reads its
    own rows only). InputError as fitting()."""
    found, wanted = fitting(model, folder)
    for name, p in wanted.items():
        rows, first, _ = own_rows(p)
        for a, b in pieces(rows):
            with open_weights(found[name][0]) as file:    # anew: mapped pages count as ours till it is closed
                rows[a:b].copy_(file.get_slice(name)[first + a:first + b])
    return model


def own_rows(p):
    """Of a parameter, plain or sharded: the rows that this rank holds, the place of their first one in the
    whole, and whether this rank is the first of those that hold them (replicas hold the same)."""
    p, first, foremost = p.detach(), 0, True
    if not isinstance(p, DTensor):
        return p, first, foremost
    for dim, place in enumerate(p.placements):
        rank = p.device_mesh.get_local_rank(dim)
        if place.is_shard():              # FSDP2 gives each rank ceil(rows / ranks) rows, the last ones fewer
            first = rank * -(-p.shape[0] // p.device_mesh.size(dim))
        else:
            foremost = foremost and rank == 0
    return p.to_local(), first, foremost


def pieces(rows) -> list:
    """(begin, end) of consecutive rows that hold at most 16 MiB of fp32 together."""
    step = max(1, 2 ** 22 // math.prod(rows.shape[1:]))
    return [(a, min(a + step, len(rows))) for a in range(0, len(rows), step)]


def hf_name(name: str) -> str:
    """The name that a parameter bears in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head") else "model." + name


def open_weights(path: str):
    """safe_open, with a damaged or missing file told as a user's error."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def weight_files(folder: str) -> dict:
    """{tensor name: (file, shape, dtype)} over the safetensors files of a folder, from their headers."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; expected a Hugging Face model folder")
    index, files = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if os.path.exists(index):
        spec = read_json(index)
        names = list(spec["weight_map"].values()) if isinstance(spec, dict) and isinstance(
            spec.get("weight_map"), dict) else []
        if not names or not all(isinstance(f, str) and f == os.path.basename(f) and f.endswith(".safetensors")
                                for f in names):
            raise InputError(f"{index}: expected a weight_map of tensor names to safetensors files beside it")
        files = sorted(set(names))
    elif not os.path.exists(os.path.join(folder, files[0])):
        pickle = [f for f in sorted(os.listdir(folder)) if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        hint = " is a pickle, which can run code and is never loaded: convert it to safetensors"
        raise InputError(f"{folder}: no model.safetensors in it" + (f"; {pickle[0]}{hint}" if pickle else ""))
    found = {}
    for file in (os.path.join(folder, f) for f in files):
        with open_weights(file) as opened:
            for name in opened.keys():
                piece = opened.get_slice(name)
                if name in found:
                    raise InputError(f"{file}: {name} is in {found[name][0]} as well")
                found[name] = file, list(piece.get_shape()), piece.get_dtype()
    return found


def same(found: dict, a: str, b: str) -> bool:
    """Whether two stored tensors are equal."""
    if b not in found or found[a][1:] != found[b][1:] or found[a][2] not in FLOATS.values():
        return False
    with open_weights(found[a][0]) as one, open_weights(found[b][0]) as other:
        return torch.equal(one.get_tensor(a), other.get_tensor(b))


def save(model: Transformer, folder: str, dtype=None, shard_bytes: int = 5 * 10 ** 9) -> None:
    """Write a Hugging Face folder that transformers and vLLM load: config, generation config, the tokenizer
    files of the folder that the model came from, and weights in dtype (default: the model's), in files of
    about shard_bytes at most. All ranks call it, and each writes its own rows into their places, 16 MiB at a
    time: no tensor is ever gathered. The folder bears its name only when it is whole.
    """
    c, dtype = model.config, dtype or next(model.parameters()).dtype
    files, size = [{}], 0                                               # the tensors of each file, by name
    for name, p in model.named_parameters():
        size += p.numel() * dtype.itemsize
        if files[-1] and size > shard_bytes:
            files.append({})
            size = p.numel() * dtype.itemsize
        files[-1][hf_name(name)] = p
    files = {"model.safetensors" if len(files) == 1 else f"model-{s:05d}-of-{len(files):05d}.safetensors": t
             for s, t in enumerate(files, 1)}
    together = torch.distributed.is_initialized()
    writer = not together or torch.distributed.get_rank() == 0
    part = folder.rstrip("/") + ".partial"
    if writer:
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        for file, tensors in files.items():
            with open(os.path.join(part, file), "wb") as out:
                out.write(header(tensors, dtype))
    if together:
        torch.distributed.barrier()
    for file, tensors in files.items():
        place = len(header(tensors, dtype))
        with open(os.path.join(part, file), "r+b") as out:
            for p in tensors.values():
                rows, first, foremost = own_rows(p)
                row_bytes = math.prod(p.shape[1:]) * dtype.itemsize
                out.seek(place + first * row_bytes)
                for a, b in pieces(rows) if foremost else ():
                    out.write(rows[a:b].to("cpu", dtype).contiguous().view(torch.uint8).numpy())
                place += len(p) * row_bytes
            out.flush()
            os.fsync(out.fileno())
    if together:
        torch.distributed.barrier()
    if not writer:
        return
    raw = {"architectures": ["Gemma2ForCausalLM" if c.gemma else "LlamaForCausalLM"], **c.raw,
           "torch_dtype": str(dtype).removeprefix("torch.")}
    raw.pop("dtype", None)                            # transformers 5's name for it; 4 and 5 read the old one
    write_json(raw, os.path.join(part, "config.json"))
    write_json(dict(bos_token_id=c.bos_id, eos_token_id=list(c.eos_ids)),
               os.path.join(part, "generation_config.json"))
    if len(files) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        write_json(dict(metadata=dict(total_size=total), weight_map=weight_map),
                   os.path.join(part, "model.safetensors.index.json"))
    for file in CARRIED:
        if os.path.exists(os.path.join(c.folder, file)):
            shutil.copyfile(os.path.join(c.folder, file), os.path.join(part, file))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def header(tensors: dict, dtype) -> bytes:
    """What a safetensors file of these tensors begins with: the length of a JSON object, and the object: the
    dtype, shape and place of each. (The library writes only what is whole in memory.)"""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, p in tensors.items():
        begin, end = end, end + p.numel() * dtype.itemsize
        entries[name] = dict(dtype=FLOATS[dtype], shape=list(p.shape), data_offsets=[begin, end])
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)                                     # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def write_json(value, path: str) -> None:
    """Write a value as JSON, one key a line; after a crash the file is the old one or the new one."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
