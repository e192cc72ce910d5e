"""Plain decoders without transformers, one option per hazard, every parameter far from trivial.

`decoder(qkv="fused", tied=True)` builds one, `export(...)` builds and exports it; `HAZARDS` names the cases in which
tools that match by name corrupt a model silently, `LAYOUTS` the ways in which weights are laid out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


@dataclass(frozen=True)
class Options:
    """Sizes differ from each other, and heads · head_dim from hidden, so that no two axes agree by accident."""

    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 80
    vocab: int = 96
    layers: int = 2
    norm: str = "rms"  # rms, rms_plus_one, rms_bare, rms_bias, layer, layer_nobias, layer_bare
    fused_norm: bool = False  # one aten op instead of pow, mean, rsqrt, mul with casts
    placement: str = "pre"  # pre, post, sandwich
    qkv: str = "separate"  # separate, fused, interleaved (q, k, v of a head together)
    mlp: str = "gated"  # gated, fused (gate and up in one matrix), interleaved (gate, up alternate), plain
    linear: str = "linear"  # linear, conv1d (transposed weights, addmm)
    bias: str = "none"  # none, v, qkv, all
    positions: str = "rope"  # rope, rope_interleaved, learned, none
    attention: str = "sdpa"  # sdpa, eager
    qk_norm: bool = False
    parallel: bool = False
    tied: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    layer_scale: bool = False
    value_head: bool = False  # a second head that reads the raw residual stream
    early_exit: bool = False  # logits after the first layer, through the same head, without the norm
    returns_stream: bool = False  # the residual stream is an output
    sliced: bool = False  # half of the hidden axis is read by itself
    shared_norm: bool = False  # one weight for both norms of a layer
    shared_mlp: bool = False  # layers after the first read the first one's MLP: parameters under several names
    named_twice: bool = False  # the head stands in the state dict under a second name, and is used by both
    cache: bool = False  # past keys and values in, joined ones out
    static_cache: int = 0  # places of a cache that is written at `positions`; 0 for none


# Options of the cases in which tools that match by name or by shape corrupt a model silently.
HAZARDS: dict[str, dict[str, Any]] = {
    "value_head": dict(value_head=True),
    "early_exit": dict(early_exit=True),
    "layer_scale": dict(layer_scale=True),
    "tied": dict(tied=True),
    "named_twice": dict(named_twice=True),
    "shared_mlp": dict(shared_mlp=True),
    "shared_norm": dict(shared_norm=True),
    "sliced": dict(sliced=True),
    "returns_stream": dict(returns_stream=True),
    "v_bias": dict(bias="v"),
    "norm_bias": dict(norm="layer"),
    "rms_norm_bias": dict(norm="rms_bias"),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groupless": dict(kv_heads=4),
    "one_kv_head": dict(kv_heads=1),
    "fused_qkv": dict(qkv="fused", bias="all"),
    "interleaved_qkv": dict(qkv="interleaved", bias="all"),
    "fused_gate_up": dict(mlp="fused"),
    "interleaved_gate_up": dict(mlp="interleaved"),
    "plain_mlp": dict(mlp="plain", bias="all"),
    "conv1d": dict(linear="conv1d", qkv="fused", mlp="plain", bias="all", norm="layer", positions="learned"),
    "all_bias": dict(bias="all"),
    "qkv_bias": dict(bias="qkv"),
    "qk_norm": dict(qk_norm=True),
    "parallel": dict(parallel=True),
    "learned_positions": dict(positions="learned"),
    "no_positions": dict(positions="none"),
    "interleaved_rope": dict(positions="rope_interleaved"),
    "eager_attention": dict(attention="eager"),
    "embedding_multiplier": dict(embedding_multiplier=6.9),
    "residual_multiplier": dict(residual_multiplier=0.22),
    "layer_norm": dict(norm="layer"),
    "layer_norm_without_bias": dict(norm="layer_nobias"),
    "layer_norm_bare": dict(norm="layer_bare"),
    "rms_bare": dict(norm="rms_bare"),
    "rms_plus_one": dict(norm="rms_plus_one"),
    "fused_rms": dict(fused_norm=True),
    "fused_layer_norm": dict(norm="layer", fused_norm=True),
    "post_norm": dict(placement="post"),
    "sandwich_norm": dict(placement="sandwich"),
    "wide": dict(hidden=64, ffn=96),
}


def decoder(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """A randomised decoder in eval mode."""
    torch.manual_seed(seed)
    model = Decoder(Options(**options))
    _randomise(model, seed)
    return model.eval().to(dtype)


def export(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, dynamic: bool = False, **options: Any
) -> ExportedProgram:
    """The exported program of :func:`decoder`; `dynamic` marks batch and lengths."""
    model = decoder(seed=seed, dtype=dtype, **options)
    return export_module(model, sample_args(model.options, dtype), dynamic=dynamic)


def export_module(model: nn.Module, args: tuple[Any, ...], *, dynamic: bool = False) -> ExportedProgram:
    """torch.export.export with every axis of every tensor argument dynamic (those that can be) or none."""
    shapes = tuple(_automatic(a) for a in args) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=shapes)


def _automatic(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return dict.fromkeys(range(arg.ndim), Dim.AUTO)
    return [_automatic(a) for a in arg]


def sample_args(
    o: Options, dtype: torch.dtype = torch.float32, *, batch: int = 2, seq: int = 5, past: int = 3
) -> tuple[Any, ...]:
    """Arguments of :meth:`Decoder.forward`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, o.vocab, (batch, seq), generator=generator)
    if not (o.cache or o.static_cache):
        return (ids,)
    size = (batch, o.kv_heads, o.static_cache or past, o.head_dim)
    caches = [torch.randn(size, generator=generator).to(dtype) for _ in range(2 * o.layers)]
    return ids, torch.arange(past, past + seq), caches


class Decoder(nn.Module):
    """Embedding, layers, norm, head. forward(ids) -> logits, with further outputs as the options say;
    forward(ids, positions, caches) -> (logits, ..., caches) with a cache (keys and values of each layer in turn)."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.options = o
        self.embed = nn.Embedding(o.vocab, o.hidden)
        self.places = nn.Embedding(64, o.hidden) if o.positions == "learned" else None
        self.layers = nn.ModuleList(Layer(o) for _ in range(o.layers))
        self.norm = Norm(o.hidden, o)
        self.head = nn.Linear(o.hidden, o.vocab, bias=False)
        if o.tied:
            self.head.weight = self.embed.weight
        if o.value_head:
            self.value_head = nn.Linear(o.hidden, 1)
        if o.sliced:
            self.first_half = nn.Linear(o.hidden // 2, 3)
        if o.shared_mlp:
            for layer in list(self.layers)[1:]:
                layer.mlp = self.layers[0].mlp
        if o.named_twice:
            self.second_name = self.head

    def forward(self, ids: Tensor, positions: Tensor | None = None, caches: Sequence[Tensor] = ()) -> Any:
        o = self.options
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x = self.embed(ids) * o.embedding_multiplier
        if self.places is not None:
            x = x + self.places(positions)
        extra: list[Tensor] = []
        joined: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, positions, caches[2 * i : 2 * i + 2])
            joined += kept
            if i == 0 and o.early_exit:
                extra.append(self.head(x))
        if o.value_head:
            extra.append(self.value_head(x))
        if o.sliced:
            extra.append(self.first_half(x[..., : o.hidden // 2]))
        if o.returns_stream:
            extra.append(x)
        if o.named_twice:
            extra.append(self.second_name(self.norm(x * 0.5)))
        logits = self.head(self.norm(x))
        if joined:
            return logits, *extra, joined
        return (logits, *extra) if extra else logits


class Layer(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.options = o
        self.attention = Attention(o)
        self.mlp = MLP(o)
        self.norm1 = Norm(o.hidden, o)
        self.norm2 = self.norm1 if o.shared_norm else Norm(o.hidden, o)
        if o.placement == "sandwich":
            self.after1, self.after2 = Norm(o.hidden, o), Norm(o.hidden, o)
        if o.layer_scale:
            self.scale1, self.scale2 = nn.Parameter(torch.ones(o.hidden)), nn.Parameter(torch.ones(o.hidden))

    def forward(self, x: Tensor, positions: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        o = self.options
        before = o.placement != "post"
        a, kept = self.attention(self.norm1(x) if before else x, positions, past)
        if o.parallel:
            return x + self._branch(a, 1) + self._branch(self.mlp(self.norm2(x)), 2), kept
        x = x + self._branch(a, 1)
        x = x + self._branch(self.mlp(self.norm2(x) if before else x), 2)
        return x, kept

    def _branch(self, y: Tensor, i: int) -> Tensor:
        o = self.options
        if o.placement == "post":
            y = (self.norm1 if i == 1 else self.norm2)(y)
        if o.placement == "sandwich":
            y = (self.after1 if i == 1 else self.after2)(y)
        if o.layer_scale:
            y = y * (self.scale1 if i == 1 else self.scale2)
        return y if o.residual_multiplier == 1.0 else y * o.residual_multiplier


class Norm(nn.Module):
    def __init__(self, size: int, o: Options) -> None:
        super().__init__()
        self.kind, self.fused, self.eps = o.norm, o.fused_norm, 1e-5
        start = torch.zeros(size) if o.norm == "rms_plus_one" else torch.ones(size)
        self.weight = None if o.norm.endswith("bare") else nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(size)) if o.norm in ("layer", "rms_bias") else None

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-1],)
        if self.fused and self.kind.startswith("layer"):
            return F.layer_norm(x, size, self.weight, self.bias, self.eps)
        if self.fused:
            y = F.rms_norm(x, size, self._weight(), self.eps)
            return y if self.bias is None else y + self.bias
        wide = x.float()
        if self.kind.startswith("layer"):
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        y = wide.to(x.dtype)
        weight = self._weight()
        y = y if weight is None else y * weight
        return y if self.bias is None else y + self.bias

    def _weight(self) -> Tensor | None:
        return 1.0 + self.weight if self.kind == "rms_plus_one" and self.weight is not None else self.weight


class Transposed(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size_in, size_out))
        self.bias = nn.Parameter(torch.zeros(size_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


def _linear(o: Options, size_in: int, size_out: int, kind: str) -> nn.Module:
    if o.linear == "conv1d":
        return Transposed(size_in, size_out)
    biased = o.bias == "all" or (o.bias == "qkv" and kind in "qkv") or (o.bias == "v" and kind == "v")
    return nn.Linear(size_in, size_out, bias=biased)


class Attention(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.options = o
        q, kv = o.heads * o.head_dim, o.kv_heads * o.head_dim
        if o.qkv == "separate":
            self.q, self.k, self.v = (
                _linear(o, o.hidden, q, "q"),
                _linear(o, o.hidden, kv, "k"),
                _linear(o, o.hidden, kv, "v"),
            )
        else:
            self.qkv = _linear(o, o.hidden, q + 2 * kv, "qkv")
        self.o = _linear(o, q, o.hidden, "o")
        if o.qk_norm:
            self.q_norm, self.k_norm = Norm(o.head_dim, o), Norm(o.head_dim, o)

    def forward(self, x: Tensor, positions: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        o = self.options
        q, k, v = (t.transpose(1, 2) for t in self._project(x))
        if o.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if o.positions.startswith("rope"):
            q, k = _rope(q, positions, o), _rope(k, positions, o)
        kept: list[Tensor] = []
        if o.static_cache:
            kept = [past[0].index_copy(2, positions, k), past[1].index_copy(2, positions, v)]
        elif o.cache:
            kept = [torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)]
        k, v = kept or (k, v)
        groups = o.heads // o.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        places = torch.arange(k.shape[2], device=x.device)
        y = self._attend(q, k, v, places[None, :] <= positions[:, None])
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1)), kept

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        o = self.options
        if o.qkv == "separate":
            return tuple(p(x).unflatten(-1, (-1, o.head_dim)) for p in (self.q, self.k, self.v))
        y = self.qkv(x)
        if o.qkv == "fused":
            sizes = [n * o.head_dim for n in (o.heads, o.kv_heads, o.kv_heads)]
            return tuple(t.unflatten(-1, (-1, o.head_dim)) for t in y.split(sizes, -1))
        groups = o.heads // o.kv_heads
        y = y.unflatten(-1, (o.kv_heads, groups + 2, o.head_dim))
        return y[..., :groups, :].flatten(-3, -2), y[..., groups, :], y[..., groups + 1, :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.options.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def _rope(x: Tensor, positions: Tensor, o: Options) -> Tensor:
    """x (batch, heads, tokens, head_dim), positions (tokens,)."""
    half = o.head_dim // 2
    frequencies = 1.0 / 100.0 ** (torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None].float() * frequencies
    if o.positions == "rope_interleaved":
        cos, sin = (f(angles).repeat_interleave(2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((f(angles), f(angles)), -1).to(x.dtype) for f in (torch.cos, torch.sin))
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


class MLP(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.kind = o.mlp
        if o.mlp == "gated":
            self.gate, self.up = _linear(o, o.hidden, o.ffn, "gate"), _linear(o, o.hidden, o.ffn, "up")
        elif o.mlp == "plain":
            self.up = _linear(o, o.hidden, o.ffn, "up")
        else:
            self.gate_up = _linear(o, o.hidden, 2 * o.ffn, "gate_up")
        self.down = _linear(o, o.ffn, o.hidden, "down")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.down(F.gelu(self.up(x)))
        if self.kind == "gated":
            gate, up = self.gate(x), self.up(x)
        elif self.kind == "fused":
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


def _randomise(model: Decoder, seed: int) -> None:
    """Norm scales and layer scales far from 1 (from 0 for the 1 + w kind), biases from 0, matrices z/√fan_in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.2 * z)
            elif p.ndim == 1:
                p.copy_(p + 0.3 * z)
            elif name in ("embed.weight", "places.weight"):
                p.copy_(z)
            else:
                p.copy_(
                    z / math.sqrt(p.shape[0] if model.options.linear == "conv1d" and "head" not in name else p.shape[1])
                )


class Twice(nn.Module):
    """One linear layer that is applied twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(self.linear(x).tanh()).tanh())  # type: ignore[no-any-return]
