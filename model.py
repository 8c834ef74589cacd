"""model.py: LLaMA and Gemma-2 decoders with access to the output of every layer.

There is no training code here. On a first reading, stop at the first "supporting code".

Shapes, in every file of this project:
    N  tokens of all rows, laid end to end      V  vocabulary size      T  query tokens of attention
    N_k  those in layer k         R  rows       L  layers               S  key tokens of attention
    D  hidden size    H  query heads    K  key/value heads    h  size of a head    n  any number
    B  batch of attention: 1 in training, R in generation

Norms, projections, MLP and head work on flat (N, D) tensors without padding. Only attention needs
to know where a row begins and which tokens attend to which (class Packed). A weight keeps its
dtype (fp32 in training) and is cast to `compute_dtype`, bf16 or fp32, where it is used. Norms,
softmax and logits are in fp32. Parameter names are Hugging Face's, without the prefix "model.".
"""
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

warnings.filterwarnings("ignore", "torch.distributed is disabled")      # dcp.load in load_weights
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class InputError(Exception):
    """A user's mistake, in one line that the programs print before they exit with code 2."""


def pick_device(name: str) -> str:
    """The device type for auto, cpu or cuda; auto is cuda where there is one. Also sets options of
    torch for speed and memory."""
    # cuDNN's attention builds a plan for every new length, which takes about a second.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # In bf16 on CPUs, oneDNN keeps megabytes of kernels for every new length, in two caches of
    # 1,024 entries. 32 are enough.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device; use --device cpu or a CUDA build of torch")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


# ------------------------------------------------------------------------------------ configuration

# The values that transformers assumes where config.json has no entry.
COMMON = dict(rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, num_key_value_heads=None)
DEFAULTS = {
    "llama": dict(COMMON, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
                  tie_word_embeddings=False, hidden_act="silu", head_dim=None,
                  attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma2": dict(COMMON, max_position_embeddings=8192, bos_token_id=2, eos_token_id=1,
                   tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", head_dim=256,
                   query_pre_attn_scalar=256, sliding_window=4096,
                   attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
}
# Entries that change the computation in a way that is not implemented here.
REFUSED = ("attention_bias", "mlp_bias", "attention_dropout", "quantization_config",
           "use_bidirectional_attention")
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass
class Config:
    """A decoder, with the field names of Hugging Face's config.json."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None           # LLaMA-3.1: stretches the long wavelengths
    tie_word_embeddings: bool           # the head is the embedding matrix
    attn_logit_softcapping: float | None        # Gemma-2: cap * tanh(score / cap) with a cap of 50
    final_logit_softcapping: float | None       # the same for logits, 30
    bos_token_id: int
    # Fields that config.json does not have:
    eos_ids: tuple              # generation stops at any of them; training teaches the first
    attn_scale: float           # factor on q.k: 1/sqrt(h); Gemma-2: 1/sqrt(query_pre_attn_scalar)
    windows: tuple              # for each layer: how far back a token sees, or None for no limit
    gemma: bool                 # (1 + w) norms, two more norms a layer, scaled embeddings, GeGLU
    raw: dict                   # config.json as read
    files: dict                 # {name: bytes} of the folder's small files
    folder: str

    @classmethod
    def read(cls, folder: str) -> "Config":
        """The Config of folder/config.json; InputError for a file or model we do not support."""
        files, path = read_small_files(folder), f"{folder}/config.json"
        raw = parse_json(files["config.json"], path)
        family = raw.get("model_type")
        if str(family) not in DEFAULTS:
            raise InputError(f"{path}: model_type is {family!r}, expected {' or '.join(DEFAULTS)}")
        gemma = family == "gemma2"
        c = {**DEFAULTS[family], **raw, "gemma": gemma, "raw": raw, "files": files,
             "folder": folder}
        # Generation may stop at more tokens than config.json names.
        generation = files.get("generation_config.json", b"{}")
        more = parse_json(generation, f"{folder}/generation_config.json").get("eos_token_id")
        try:
            checked = {**cls.__annotations__, "query_pre_attn_scalar": float, "sliding_window": int}
            for name, kind in checked.items():
                check_number(name, c.get(name), kind)
            # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters
            rope = {**(c["rope_scaling"] or {}), **(c.get("rope_parameters") or {})}
            given = "unknown" if rope.keys() - {"rope_theta"} else "default"
            rope_type = rope.setdefault("rope_type", rope.get("type", given))
            activation = c.get("hidden_activation") or c.get("hidden_act")
            refused = [f"{key}={c[key]!r}" for key in REFUSED if c.get(key)]
            if rope_type not in ("default", "llama3"):
                refused.append(f"rope type {rope_type!r}")
            if activation != ("gelu_pytorch_tanh" if gemma else "silu"):
                refused.append(f"activation {activation!r}")
            if refused:
                raise ValueError(f"asks for {', '.join(refused)}; not implemented here")
            c["rope_theta"] = rope.pop("rope_theta", c["rope_theta"])
            c["rope_scaling"] = rope if rope_type == "llama3" else None
            for name in LLAMA3_ROPE if rope_type == "llama3" else ():
                check_number(name, rope[name], float)
            c["num_key_value_heads"] = c["num_key_value_heads"] or c["num_attention_heads"]
            c["head_dim"] = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
            if c["num_attention_heads"] % c["num_key_value_heads"] or c["head_dim"] % 2:
                raise ValueError(f"{c['num_attention_heads']} heads, {c['num_key_value_heads']} "
                                 f"key/value heads of size {c['head_dim']}: expected a multiple, "
                                 "and an even size")
            c["attn_scale"] = (c["query_pre_attn_scalar"] if gemma else c["head_dim"]) ** -0.5
            if c["num_hidden_layers"] > 1000:
                raise ValueError(f"num_hidden_layers is {c['num_hidden_layers']}, expected <= 1000")
            c["windows"] = (None,) * c["num_hidden_layers"]
            if gemma:           # by default every other layer has a window
                kinds = c.get("layer_types") or (
                    ["sliding_attention", "full_attention"] * c["num_hidden_layers"])
                windows = {"sliding_attention": c["sliding_window"], "full_attention": None}
                if not set(kinds) <= windows.keys() or len(kinds) < c["num_hidden_layers"]:
                    raise ValueError(f"layer_types is {kinds!r}, expected {' or '.join(windows)} "
                                     "for each layer")
                c["windows"] = tuple(windows[kinds[k]] for k in range(c["num_hidden_layers"]))
            eos = []
            for ids in (c["eos_token_id"], more):       # each an id, a list of them, or null
                eos += ids if isinstance(ids, list) else [ids]
            eos = [i for i in eos if i is not None]
            ids = [i for i in (c["bos_token_id"], *eos) if type(i) is int]
            if not eos or len(ids) <= len(eos) or not 0 <= min(ids) <= max(ids) < c["vocab_size"]:
                raise ValueError(f"bos_token_id is {c['bos_token_id']}, eos_token_id (here and in "
                                 f"generation_config.json) is {eos}; expected ids below vocab_size")
            c["eos_ids"] = tuple(dict.fromkeys(eos))
            return cls(**{name: c[name] for name in cls.__annotations__})
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"{path}: {what}") from None

    def json_of(self, name: str) -> dict:
        """The object in one of the folder's JSON files; empty without the file."""
        return parse_json(self.files.get(name, b"{}"), f"{self.folder}/{name}")


def check_number(name: str, value, kind) -> None:
    """ValueError if a value of config.json is not of its kind, or too large for a computer."""
    if value is None or name == "bos_token_id":         # these are checked elsewhere
        return
    if kind is bool and type(value) is not bool:
        raise ValueError(f"{name} is {value!r}, expected true or false")
    if kind in (int, float, float | None):
        types = (int,) if kind is int else (int, float)
        if type(value) not in types or not 0 < value <= 10 ** 8:
            raise ValueError(f"{name} is {value!r}, expected a positive number"
                             f"{' without a fraction' * (kind is int)}")


# --------------------------------------------------------------------- the tokens of a forward pass

class Packed:
    """Token segments laid end to end for one forward pass, without padding.

    A row is a first segment, such as a prompt, and any number of segments that each continue it. A
    token attends to the first segment and to its own segment, up to itself. A token of depth d
    passes through layers 1..d and is then dropped.
    """

    def __init__(self):
        self.ids, self.position, self.row, self.depth = [], [], [], []
        self.segment = []       # 0 in the first segment of a row, else the segment's first index

    def __len__(self):
        return len(self.ids)

    def add(self, ids: list, depth: int, after: range | None = None) -> range:
        """Append a segment and return its flat indices. It starts a row, or it continues `after`,
        the range of the first segment of the row."""
        begin = len(self.ids)
        if after is None:
            row, segment, position = (self.row[-1] + 1 if self.row else 0), 0, 0
        else:
            row, segment, position = self.row[after[0]], begin, len(after)
            assert row == self.row[-1], "the segments of a row are added before the next row begins"
        self.ids += ids
        self.position += range(position, position + len(ids))
        self.row += [row] * len(ids)
        self.segment += [segment] * len(ids)
        self.depth += [depth] * len(ids)
        return range(begin, begin + len(ids))

    def index(self, indices, layer: int):
        """Map flat indices (n,) of tokens with depth >= layer to rows of the (N_k, D) output of
        `layer`."""
        present = torch.tensor(self.depth) >= layer
        return (present.cumsum(0) - 1)[torch.as_tensor(indices, dtype=torch.long)]


@dataclass
class AttentionInputs:
    """Inputs of attention other than the hidden states. Attention runs on one part at a time: a row
    or, with FlexAttention, all rows and some padding. Consecutive layers with the same tokens share
    one object."""
    cos: torch.Tensor           # (B, T, 1, h) in fp32: the rotation of each token of all parts
    sin: torch.Tensor
    sizes: list                 # number of tokens of each part; their sum is T
    masks: dict                 # {window: a mask for each part, see Attention.attend_part}
    entering: torch.Tensor | None = None    # (n,) rows of the output of the layer below
    # Generation: the keys and values so far, (L, 2, R, S or more, K, h), and where in them these
    # tokens go, (R, T); see next_logits().
    cache: torch.Tensor | None = None
    position: torch.Tensor | None = None


# -------------------------------------------------------------------------------------- the decoder

class Transformer(nn.Module):
    """The decoder. compute_dtype None means the dtype of the weights."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.compute_dtype, self.flex = config, None, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, k) for k in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:       # a tied head has no parameter of its own
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self):
        """W_out, (V, D)."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, packed: Packed, layers: tuple) -> dict:
        """{k: the residual stream after layer k, (N_k, D) in the compute dtype} for k of `layers`.

        k = 0: the embeddings; k = L: before the final norm. The N_k tokens are those of depth k or
        more, in order (see Packed.index). No layer above max(layers) is computed.
        """
        top, device = max(layers), self.embed_tokens.weight.device
        # Layer 1, and the layers before which tokens are dropped. Their inputs are made before the
        # first layer runs, so that the GPU does not wait for the CPU between layers.
        entries = {1} | {depth + 1 for depth in packed.depth if depth < top}
        inputs = {k: attention_inputs(packed, k, self.config, device, self.flex) for k in entries}
        x = self.embed(to_device(torch.tensor(packed.ids), device))         # (N, D)
        outputs = {0: x} if 0 in layers else {}
        for k in range(1, top + 1):
            if k in entries:
                current = inputs[k]
                if len(current.entering) < len(x):
                    x = x.index_select(0, current.entering)                 # (N_k, D)
            x = self.layers[k - 1](x, current)                              # (N_k, D)
            if k in layers:
                outputs[k] = x
        return outputs

    def embed(self, ids):
        """Token ids (n,) -> (n, D) in the compute dtype."""
        x = self.embed_tokens(ids)
        x = x.to(self.compute_dtype or x.dtype)
        if self.config.gemma:
            x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype)
        return x

    def logits(self, x):
        """Residual stream (n, D) -> logits (n, V) in fp32: final norm, head, cap."""
        x = self.norm(x)
        logits = F.linear(x, self.head_weight.to(x.dtype)).float()
        return cap(logits, self.config.final_logit_softcapping)

    def compile_layers(self, flex: bool) -> None:
        """Use torch.compile for the layers and, with `flex`, FlexAttention, which has no backward
        pass on CPUs. Attention stays outside the compiled layers because its masks change."""
        # All layers share compiled functions, which need a graph for each kind of layer, gradient
        # mode and padded size.
        torch._dynamo.config.recompile_limit = 64
        self.flex = flex
        compiled = torch.compile(flex_attention, dynamic=False) if flex else flex_attention
        for layer in self.layers:
            layer.self_attn.flex_attention = compiled
            layer.self_attn.attend = torch.compiler.disable(layer.self_attn.attend)
            layer.block = torch.compile(layer.block, dynamic=True)


class Layer(nn.Module):
    """One block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.gemma = config.gemma
        self.checkpointing = False      # True: keep only the input and recompute in backward
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        if self.gemma:
            self.pre_feedforward_layernorm = RMSNorm(config)
            self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x, inputs: AttentionInputs):                          # (n, D) -> (n, D)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.block, x, inputs, use_reentrant=False)
        return self.block(x, inputs)

    def block(self, x, inputs: AttentionInputs):
        if self.gemma:      # unlike LLaMA's, post_attention_layernorm is applied after attention
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), inputs))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.config, self.index, self.window = config, index, config.windows[index]
        self.flex_attention = flex_attention        # compile_layers() replaces it
        D, h = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.o_proj = Linear(D, H * h), Linear(H * h, D)
        self.k_proj, self.v_proj = Linear(D, K * h), Linear(D, K * h)

    def forward(self, x, inputs: AttentionInputs):                          # (n, D) -> (n, D)
        B, T = inputs.cos.shape[:2]
        shape = (B, len(x) // B, -1, self.config.head_dim)
        q, k, v = (f(x).view(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
        if T > shape[1]:        # FlexAttention's padding, here because torch.compile fuses it
            q, k, v = (F.pad(y, (0, 0, 0, 0, 0, T - shape[1])) for y in (q, k, v))
        # q (B, T, H, h), k and v (B, T, K, h)
        out = self.attend(rotate(q, inputs), rotate(k, inputs), v, inputs)  # (B, T, H, h)
        return self.o_proj(out[:, :shape[1]].reshape(len(x), -1))

    def attend(self, q, k, v, inputs: AttentionInputs):
        """q (B, T, H, h), k and v (B, T, K, h) -> (B, T, H, h), part by part."""
        masks = inputs.masks[self.window]
        if inputs.cache is not None:
            cache, rows = inputs.cache[self.index], torch.arange(len(q), device=q.device)[:, None]
            cache[0, rows, inputs.position], cache[1, rows, inputs.position] = k, v
            k, v = cache[:, :, :masks[0].shape[-1]]                         # (R, S, K, h)
        if len(masks) == 1:
            return self.attend_part(q, k, v, masks[0])
        parts = zip(*(y.split(inputs.sizes, dim=1) for y in (q, k, v)), masks)
        return torch.cat([self.attend_part(*part) for part in parts], dim=1)

    def attend_part(self, q, k, v, mask):
        """q (B, T, H, h), k and v (B, S, K, h) of one part -> (B, T, H, h).

        mask: None for causal; a bool tensor that expands to (B, H, T, S), True where a query sees a
        key; or a BlockMask, which selects FlexAttention.
        """
        scale, limit = self.config.attn_scale, self.config.attn_logit_softcapping
        dtype, grouped = q.dtype, q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H or K, T or S, h)
        if isinstance(mask, BlockMask):
            def capped(score, batch, head, query, key):
                return cap(score, limit)
            out = self.flex_attention(q, k, v, capped if limit else None, mask, scale,
                                      enable_gqa=grouped)
            return out.transpose(1, 2)
        if q.device.type == "cpu":      # CPUs compute attention faster in fp32 than in bf16
            q, k, v = q.float(), k.float(), v.float()
        if limit is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                 scale=scale, enable_gqa=grouped)
        else:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)        # (B, H, S, h)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            scores = cap((q @ k.transpose(2, 3)).float() * scale, limit)    # (B, H, T, S)
            if mask is None:
                mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).to(dtype)


class MLP(nn.Module):
    """Gated MLP: SwiGLU (LLaMA), or GeGLU with the tanh approximation (Gemma-2)."""

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
        self.offset, self.eps = float(config.gemma), config.rms_norm_eps
        self.weight = nn.Parameter(torch.full((config.hidden_size,), 1.0 - self.offset))

    def forward(self, x, frozen: bool = False):                             # (n, D) -> (n, D)
        w = self.weight.detach() if frozen else self.weight
        w = w.to(x.dtype).float() + self.offset     # round to the compute dtype, as FSDP does
        return F.rms_norm(x.float(), w.shape, w, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A linear map without bias that casts its weight (perhaps fp32) to the dtype of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# ------------------------------------------------------------------------------ masks and rotations

def attention_inputs(packed: Packed, layer: int, config: Config, device, flex: bool):
    """AttentionInputs of the tokens that enter `layer`. Without `flex` each row is a part. With it
    (on GPUs) all rows are one part, padded to a power of two of 128 or more, which limits
    recompilation."""
    kept = (torch.tensor(packed.depth) >= layer).nonzero()[:, 0]
    entering = to_device(packed.index(kept, layer - 1), device)
    fields = torch.tensor([packed.position, packed.row, packed.segment])[:, kept]   # (3, n)
    if flex:
        n, size = len(kept), max(128, 1 << (len(kept) - 1).bit_length())
        fields = F.pad(fields, (0, size - n))
        # Each padding token is a row of its own, so that it sees itself and its softmax is no NaN.
        fields[1, n:] = torch.arange(-size, -n)
    position, row, segment = fields                                         # (n or size,) each
    sizes = [len(row)] if flex else torch.unique_consecutive(row, return_counts=True)[1].tolist()
    masks = {}
    for window in set(config.windows):
        if flex:
            masks[window] = [block_mask(position, row, segment, window, device)]
            continue
        masks[window] = []
        sees = visibility(position, row, segment, window)
        for index in torch.arange(len(row)).split(sizes):                   # (T,) of one row
            T = len(index)
            # The last position is T - 1 if the row is a first segment and at most one other.
            if position[index[-1]] == T - 1 and (window is None or T <= window):
                masks[window].append(None)              # plain causal attention
            else:
                mask = sees(0, 0, index[:, None], index[None, :])           # (T, T)
                masks[window].append(to_device(mask, device))
    cos, sin = rotation(config, to_device(position[None], device))
    return AttentionInputs(cos, sin, sizes, masks, entering)


def to_device(tensor, device):
    """A CPU tensor on the device. A copy to a GPU does not wait for the work that is queued there,
    so that the CPU prepares the next micro-batch while the GPU computes this one."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()            # a copy from other memory would wait
    return tensor.to(device, non_blocking=True)


def visibility(position, row, segment, window):
    """The rule that says which tokens see each other, from their fields (n,); it is a mask_mod of
    FlexAttention."""
    def sees(batch, head, query, key):
        same_text = (segment[key] == 0) | (segment[key] == segment[query])
        near = position[query] - position[key] < (window or len(position))
        return (row[query] == row[key]) & (key <= query) & same_text & near

    return sees


def block_mask(position, row, segment, window, device) -> BlockMask:
    """The mask of all rows for FlexAttention: the 128 x 128 blocks to compute and the rule in them.
    A block of queries needs the blocks of keys from the beginning of its first row up to itself."""
    size, block = len(row), 128
    counts = torch.unique_consecutive(row, return_counts=True)[1]
    row_begin = (counts.cumsum(0) - counts).repeat_interleave(counts)       # (size,)
    # For each of the b blocks of queries: its last and first block of keys, how many, and which
    # (the first number[k] entries of line k count).
    last = torch.arange(size // block)                                      # (b,)
    first = row_begin[::block] // block                                     # (b,)
    number = (last - first + 1).int()                                       # (b,)
    which = torch.minimum(first[:, None] + last, last[:, None]).int()       # (b, b)
    sees = visibility(*[to_device(field, device) for field in (position, row, segment)], window)
    number, which = to_device(number[None, None], device), to_device(which[None, None], device)
    return BlockMask.from_kv_blocks(number, which, BLOCK_SIZE=block, mask_mod=sees,
                                    seq_lengths=(size, size))


def rotation(config: Config, position):
    """RoPE (Su et al. 2021) for positions (B, T): cos and sin, each (B, T, 1, h) in fp32."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling:     # LLaMA-3.1: long wavelengths are stretched by `factor`, with a ramp
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        freq = freq * ramp + freq / s["factor"] * (1 - ramp)
    angle = position[..., None].float() * to_device(freq, position.device)  # (B, T, h/2)
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]                   # (B, T, 1, h)
    return angle.cos(), angle.sin()


def rotate(x, inputs: AttentionInputs):
    """Apply RoPE to x (B, T, heads, h); coordinate d is paired with coordinate d + h/2."""
    a, b = x.chunk(2, dim=-1)
    return x * inputs.cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * inputs.sin.to(x.dtype)


def cap(x, limit: float | None):
    """Gemma-2's soft cap, elementwise: limit * tanh(x / limit)."""
    return x if limit is None else limit * torch.tanh(x / limit)


# ---------------------------------------------------------------------- supporting code: generation

def next_logits(model: Transformer, ids, position, cache):
    """Logits (R, V) of the token after ids (R, T) at these positions (R, T). Their keys and values
    are added to the cache (L, 2, R, S or more, K, h)."""
    key = torch.arange(int(position.max()) + 1, device=ids.device)          # (S,) positions
    back = position[:, :, None] - key                                       # (R, T, S)
    masks = {}
    for window in model.config.windows:
        near = (back >= 0) & (back < (window or torch.inf))
        masks[window] = [near[:, None]]                                     # (R, 1, T, S)
    cos, sin = rotation(model.config, position)
    inputs = AttentionInputs(cos, sin, [ids.shape[1]], masks, cache=cache, position=position)
    x = model.embed(ids.flatten())                                          # (R * T, D)
    for layer in model.layers:
        x = layer(x, inputs)
    return model.logits(x.view(*ids.shape, -1)[:, -1])


@torch.no_grad()
def generate(model: Transformer, prompts: list, max_new_tokens: int, last=()) -> list:
    """Greedy decoding of R prompts, lists of ids -> a list of at most max_new_tokens ids for each.
    It ends before any of the model's end tokens, after any id in `last`, or at the last position.
    """
    c, device = model.config, model.embed_tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    if not all(0 < length < c.max_position_embeddings for length in lengths):
        raise InputError(f"prompts have {min(lengths)} to {max(lengths)} tokens; this model takes "
                         f"1 to {c.max_position_embeddings - 1}")
    size = min(max(lengths, default=0) + max_new_tokens, c.max_position_embeddings)
    shape = (c.num_hidden_layers, 2, len(prompts), size, c.num_key_value_heads, c.head_dim)
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    cache = torch.zeros(shape, dtype=dtype, device=device)
    logits = []
    for r, prompt in enumerate(prompts):            # one by one, as their lengths differ
        ids = torch.tensor([prompt], device=device)                         # (1, T)
        position = torch.arange(len(prompt), device=device)[None]
        logits.append(next_logits(model, ids, position, cache[:, :, r:r + 1]))
    position = torch.tensor(lengths, device=device)[:, None]                # (R, 1)
    out, unfinished = [[] for _ in prompts], set(range(len(prompts)))
    for count in range(max_new_tokens):
        if not unfinished:
            break
        if count:                                   # finished rows stay in the batch, unread
            logits = [next_logits(model, ids[:, None], position, cache)]
            position = (position + 1).clamp(max=size - 1)
        ids = torch.cat(logits).argmax(-1)                                  # (R,)
        for r, i in enumerate(ids.tolist()):
            if r in unfinished and i not in c.eos_ids:
                out[r].append(i)
            if i in c.eos_ids or i in last or lengths[r] + len(out[r]) >= size:
                unfinished.discard(r)
    return out


# ------------------------------------------------------------ supporting code: Hugging Face folders

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
               "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "chat_template.jinja")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_small_files(folder: str) -> dict:
    """{name: bytes} of all files but the weights. An export writes them from memory, whatever
    happens to the folder during the training. A link may lead to the hub's cache, but not out."""
    root, files = Path(folder).resolve(), {}
    if not (root / "config.json").exists():
        hint = "expected a Hugging Face model folder"
        if (root / "model" / "config.json").exists():
            hint = f"did you mean {folder}/model?"
        elif (root / "adapter_config.json").exists():
            hint = "it is a LoRA adapter; merge it into its base model first"
        elif (root / "snapshots").exists():
            hint = f"it is a hub cache; give one of the folders in {folder}/snapshots"
        elif (root / "state.json").exists():
            hint = "it is a checkpoint; resume its run to the end to get a model"
        elif not root.exists():
            hint = f"no such folder; to download a model: hf download {folder} --local-dir DIR"
        raise InputError(f"{folder}: no config.json; {hint}")
    inside = root.parents[1] if root.parent.name == "snapshots" else root
    for name in SMALL_FILES:
        path = root / name
        if not os.path.lexists(path):
            continue
        if not path.is_file() or not path.resolve().is_relative_to(inside):
            raise InputError(f"{folder}/{name}: expected a regular file in this folder, found "
                             f"{'a folder' if path.is_dir() else path.resolve()}")
        files[name] = path.read_bytes()
        if files[name].startswith(b"version https://git-lfs"):
            raise InputError(f"{folder}/{name}: a git-lfs pointer; run git lfs pull")
    return files


def load(folder: str, dtype=torch.float32, device="cpu") -> Transformer:
    """The model of a Hugging Face folder, its weights held in dtype."""
    with torch.device("meta"):
        model = Transformer(Config.read(folder)).to(dtype)
    check_weights(model, folder)                # before any memory is taken
    model.to_empty(device=device)
    load_weights(model, folder)
    return model


def load_weights(model: Transformer, folder: str, group=None) -> None:
    """Read the safetensors of a folder into a model, whole or sharded over the ranks of a group."""
    tensors = {hf_name(name): p.detach() for name, p in model.named_parameters()}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder), process_group=group,
             no_dist=group is None)
    check_finite(model, folder)


def check_finite(model: Transformer, folder: str) -> None:
    """InputError if a weight is inf or NaN; all ranks call it."""
    for name, p in model.named_parameters():
        total = p.detach().sum()
        total = total.full_tensor() if isinstance(total, DTensor) else total
        if not total.isfinite():
            raise InputError(f"{folder}: {name} has numbers that are inf or NaN")


def check_weights(model: Transformer, folder: str) -> None:
    """InputError if the safetensors of a folder are not the parameters of a model."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: no .safetensors file; pickles (.bin, .pth) are never loaded")
    found = {}                                  # name: a slice, whose numbers are not read yet
    for path in paths:
        try:
            if not path.is_file():              # a FIFO, for one, would never end
                raise ValueError("not a regular file")
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    if name in found:
                        raise ValueError(f"{name} is in another file as well")
                    found[name] = tensors.get_slice(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a safetensors file ({error}); download it again, or run "
                             "git lfs pull if it is a pointer file") from None
    expected = {hf_name(name): list(p.shape) for name, p in model.named_parameters()}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and "rotary_emb.inv_freq" not in name]
    wrong = []
    for name in [name for name in expected if name in found]:
        shape, dtype = found[name].get_shape(), found[name].get_dtype()
        if shape != expected[name] or dtype not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} is {dtype} {shape}, expected floats {expected[name]}")
    if model.config.tie_word_embeddings and HEAD in extra and EMBEDDING in found:
        extra.remove(HEAD)                      # a tied head that was stored as well
        head, embedding = found[HEAD][:], found[EMBEDDING][:]
        if not torch.equal(head, embedding.to(head.dtype)):
            wrong.append(f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true")
    problems = {"missing": missing, "not expected": extra, "wrong": wrong}
    report = [f"{len(names)} {problem}, such as {', '.join(names[:3])}"
              for problem, names in problems.items() if names]
    if report:
        raise InputError(f"{folder}: tensors do not match config.json: {'; '.join(report)}")


def hf_name(name: str) -> str:
    """The name of a parameter in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head") else "model." + name


def save(model: Transformer, folder: str, dtype=None, chat_template: str | None = None) -> None:
    """Write a Hugging Face folder: weights in dtype (default: the model's), config, chat template,
    and the tokenizer files of the folder that the model was read from.

    All ranks call it. Rank 0 gathers the weights, one after the other, and holds them in memory.
    The folder is written as FOLDER.partial and renamed when it is complete.
    """
    c, dtype = model.config, dtype or next(model.parameters()).dtype
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p        # on all ranks: a collective
        if writes:
            tensors[hf_name(name)] = whole.detach().to("cpu", dtype).contiguous()
    if not writes:
        return
    partial = Path(folder.rstrip("/") + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    write_json(exported_config(c, dtype), partial / "config.json")
    special = {"bos_token_id": c.bos_token_id, "eos_token_id": list(c.eos_ids)}
    write_json(special, partial / "generation_config.json")
    for file in SMALL_FILES[2:]:
        if file in c.files:
            (partial / file).write_bytes(c.files[file])
    if chat_template:       # transformers 5 reads the .jinja file, 4 reads tokenizer_config.json
        tokenizer_config = c.json_of("tokenizer_config.json")
        if "tokenizer.json" not in c.files:
            # else transformers 5 gives text after BOS no leading space, unlike text without BOS
            tokenizer_config["legacy"] = True
        write_json({**tokenizer_config, "chat_template": chat_template},
                   partial / "tokenizer_config.json")
        (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def exported_config(c: Config, dtype) -> dict:
    """config.json for transformers 4, which reads rope_theta, rope_scaling and torch_dtype, and for
    transformers 5, which reads rope_parameters."""
    raw = {key: value for key, value in c.raw.items() if key != "dtype"}
    rope = {**(c.rope_scaling or {"rope_type": "default"}), "rope_theta": c.rope_theta}
    architecture = "Gemma2ForCausalLM" if c.gemma else "LlamaForCausalLM"       # vLLM needs it
    return {"architectures": [architecture], **raw, "torch_dtype": str(dtype).split(".")[1],
            "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling, "rope_parameters": rope}


def read_json(path: str) -> dict:
    """The JSON object in a file; InputError if it is missing or malformed."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def parse_json(blob: bytes, path: str) -> dict:
    """The JSON object in the bytes of a file; InputError if it is malformed."""
    try:
        value = json.loads(blob)
        if not isinstance(value, dict):
            raise ValueError(f"found a {type(value).__name__}")
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON, expected an object ({error})") from None


def write_json(value, path) -> None:
    """Write a value as JSON; after a crash the file is either the old one or the new one."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:                # a full disk's error does not name the file
        raise OSError(f"{path}: {error.strerror}") from None
