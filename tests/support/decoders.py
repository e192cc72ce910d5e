"""Small decoders as plain modules, one keyword per thing that varies, and the checks that every test of the core shares.

No parameter is trivial. Everything is float64 unless asked otherwise, so that equality means equality to about 1e-15.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import spinpass
from spinpass import record
from spinpass.certificate.programs import run
from spinpass.errors import RefusedError
from tests.support.models import randomise

VOCAB, HIDDEN, FFN, HEADS, KV, HEAD = 40, 24, 40, 4, 2, 8
BATCH, SEQ = 2, 5


class RMSNorm(nn.Module):
    """x/rms(x), times ``offset + weight`` where there is one; statistics in float32 or wider."""

    def __init__(self, size: int, offset: float = 0.0, weight: bool = True) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return y if self.weight is None else y * (self.offset + self.weight)


class SpelledLayerNorm(nn.Module):
    """LayerNorm out of elementary operators."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y * self.weight + self.bias


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": RMSNorm,
    "rms1": lambda n: RMSNorm(n, 1.0),
    "rms_plain": lambda n: RMSNorm(n, weight=False),
    "rms_op": lambda n: nn.RMSNorm(n, eps=1e-6),
    "ln": nn.LayerNorm,
    "ln_nobias": lambda n: nn.LayerNorm(n, bias=False),
    "ln_plain": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "ln_spelled": SpelledLayerNorm,
}


def rope(x: Tensor) -> Tensor:
    """Half-split rotary positions of (..., seq, head)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.5 ** torch.arange(half, dtype=x.dtype)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@dataclass(frozen=True)
class Shape:
    """What a decoder is made of."""

    norm: str = "rms"
    bias: bool = False
    tied: bool = False
    rope: bool = True
    parallel: bool = False
    gated: bool = True
    qkv: str = "split"  # split, fused (q|k|v), grouped (q..qkv per kv head), interleaved (q k v per head)
    gate_up: str = "split"  # split, fused
    qk_norm: bool = False
    spelled: bool = False  # attention as matmul, softmax, matmul
    positions: bool = False  # learned positions
    post_norm: bool = False  # sandwich norms
    layers: int = 1
    hidden: int = HIDDEN
    ffn: int = FFN
    heads: int = HEADS
    kv: int = KV
    head: int = HEAD


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        if s.qkv == "split":
            self.q = nn.Linear(s.hidden, s.heads * s.head, bias=s.bias)
            self.k = nn.Linear(s.hidden, s.kv * s.head, bias=s.bias)
            self.v = nn.Linear(s.hidden, s.kv * s.head, bias=s.bias)
        else:
            self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv) * s.head, bias=s.bias)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.head), RMSNorm(s.head)
        self.o = nn.Linear(s.heads * s.head, s.hidden, bias=s.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (batch, heads, seq, head)."""
        s, (b, n, _) = self.s, x.shape
        if s.qkv == "split":
            return tuple(y.view(b, n, -1, s.head).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))  # type: ignore[return-value]
        y = self.qkv(x)
        if s.qkv == "fused":
            parts = y.split([s.heads * s.head, s.kv * s.head, s.kv * s.head], -1)
            return tuple(p.view(b, n, -1, s.head).transpose(1, 2) for p in parts)  # type: ignore[return-value]
        group = s.heads // s.kv
        y = y.view(b, n, s.kv, group + 2, s.head)
        q, k, v = y[..., :group, :], y[..., group, :], y[..., group + 1, :]
        return q.reshape(b, n, s.heads, s.head).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s
        q, k, v = self.project(x)
        if s.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if s.rope:
            q, k = rope(q), rope(k)
        return self.o(self.mixed(q, k, v).transpose(1, 2).flatten(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.s.heads // self.s.kv
        if not self.s.spelled:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        b, h, n, d = k.shape
        k, v = (y[:, :, None].expand(b, h, group, n, d).reshape(b, h * group, n, d) for y in (k, v))
        scores = q @ k.transpose(2, 3) * self.s.head**-0.5
        mask = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)
        return torch.softmax(scores + mask, -1) @ v


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        if s.gated and s.gate_up == "fused":
            self.gate_up = nn.Linear(s.hidden, 2 * s.ffn, bias=s.bias)
        else:
            self.up = nn.Linear(s.hidden, s.ffn, bias=s.bias)
            if s.gated:
                self.gate = nn.Linear(s.hidden, s.ffn, bias=s.bias)
        self.down = nn.Linear(s.ffn, s.hidden, bias=s.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.s.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.gate_up(x).chunk(2, -1) if self.s.gate_up == "fused" else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.attn, self.mlp = Attention(s), MLP(s)
        self.norm1 = NORMS[s.norm](s.hidden)
        self.norm2 = NORMS[s.norm](s.hidden)
        if s.post_norm:
            self.norm3, self.norm4 = NORMS[s.norm](s.hidden), NORMS[s.norm](s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.s.parallel:
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))
        if self.s.post_norm:
            x = x + self.norm3(self.attn(self.norm1(x)))
            return x + self.norm4(self.mlp(self.norm2(x)))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head. Hazards override :meth:`embedded`, :meth:`between` or :meth:`finish`."""

    def __init__(self, shape: Shape | None = None, **settings: Any) -> None:
        super().__init__()
        s = self.s = shape or Shape(**settings)
        self.embed = nn.Embedding(VOCAB, s.hidden)
        if s.positions:
            self.positions = nn.Embedding(16, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = NORMS[s.norm](s.hidden)
        self.head = nn.Linear(s.hidden, VOCAB, bias=False)
        if s.tied:
            self.head.weight = self.embed.weight
        self.prepare()

    def prepare(self) -> None:
        """More parameters, in a subclass."""

    def embedded(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.positions(torch.arange(ids.shape[1])) if self.s.positions else x

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x))

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        for layer, block in enumerate(self.blocks):
            x = self.between(block(x), layer)
        return self.finish(x)


def tokens(*, seq: int = SEQ, batch: int = BATCH, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def made(model: nn.Module, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Random parameters, eval mode."""
    return randomise(model, seed).to(dtype).eval()


def with_outliers(model: Any, level: float = 0.3, outlier: float = 12.0) -> Any:
    """A decoder whose norms raise two channels far above the others, as those of language models do; changed in place."""
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.fill_(level)
                norm.weight[[3, 11]] = outlier
    return model


def exported(model: nn.Module, args: tuple[Any, ...] | None = None, **options: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (tokens(),) if args is None else args, strict=False, **options)


def flat(outputs: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return [x for x in leaves if isinstance(x, Tensor)]


def relative_error(expected: Any, actual: Any) -> float:
    """The largest error of any output relative to its largest element; infinite where shapes or dtypes differ, or for NaN."""
    a, b = flat(expected), flat(actual)
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return float("inf")
    if any(x.isnan().any() for x in (*a, *b)):  # max() may look past it
        return float("inf")
    return max(
        (
            float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-30))
            for x, y in zip(a, b, strict=True)
        ),
        default=0.0,
    )


@dataclass
class Outcome:
    """What transform did: the result (None: refused), the plan, the error of the outputs."""

    result: ExportedProgram | None
    plan: spinpass.RotationPlan
    refusal: str
    error: float

    def roles(self) -> set[str]:
        return {s.role for s in self.plan.spaces} if self.result is not None else set()

    def reasons(self) -> str:
        return (
            "\n".join(map(str, self.plan.refusals))
            + "\n"
            + "\n".join(n for s in self.plan.spaces for n in (*s.notes, *(p.why for p in s.online)))
        )


def outcome(
    program: ExportedProgram,
    config: spinpass.RotationConfig | None = None,
    args: Sequence[Any] | None = None,
    **settings: Any,
) -> Outcome:
    """Transform without the certificate and compare runs lifted to float64; the input program must not change."""
    config = config or spinpass.RotationConfig(verify=False, **settings)
    before = snapshot(program)
    args = (tokens(),) if args is None else tuple(args)
    plan = spinpass.plan(program, config)
    try:
        result = spinpass.transform(program, config)
    except RefusedError as refused:
        assert snapshot(program) == before
        return Outcome(None, plan, str(refused), 0.0)
    assert snapshot(program) == before, "the input program was changed"
    expected, actual = (run(p, copy.deepcopy(args), float64=True) for p in (program, result))
    actual = restored(result, actual)
    return Outcome(result, plan, "", relative_error(expected, actual))


def restored(program: ExportedProgram, outputs: Sequence[Any]) -> list[Any]:
    """The outputs with those that the record calls a cache turned back into their original basis."""
    found = record.read(program)
    given = list(outputs)
    for index, carried in (found.outputs if found else {}).items():
        last = given[index].movedim(carried.dim, -1)
        blocks = last.unflatten(-1, (-1, carried.rotation.size))
        given[index] = carried.rotation.apply(blocks, inverse=True).flatten(-2).movedim(-1, carried.dim)
    return given


def snapshot(program: ExportedProgram) -> tuple[Any, ...]:
    """Everything that a careless pass could change."""
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    return (
        str(program.graph),
        str(program.graph_signature),
        str(program.range_constraints),
        tuple(
            (
                k,
                id(t),
                t.dtype,
                tuple(t.shape),
                t._version,
                hash(t.detach().contiguous().numpy().tobytes())
                if t.dtype != torch.bfloat16
                else float(t.detach().double().sum()),
            )
            for k, t in sorted(tensors.items())
        ),
        tuple(sorted((n.name, str(n.meta.get("val"))) for n in program.graph.nodes)),
    )
