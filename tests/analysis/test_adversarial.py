"""Small programs of the kinds that have gone wrong: what `transform` gives computes the same, or the reason it refuses is said.

Each case is a function of a tensor whose last axis has coordinates. It is put on the residual stream, on the keys and
values of attention, on the weight of a linear layer and behind a norm's scale: nothing may be changed, and nothing may
end in an error that is not of this package. Programs are float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.decoders import exported, made
from tests.support.exactness import check

HIDDEN, FFN, HEADS, HEAD, SEQ, BATCH = 16, 24, 2, 8, 6, 2
Case = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention and an MLP on a residual stream, with `case` at one place."""

    def __init__(self, case: Case, at: str) -> None:
        super().__init__()
        self.case, self.at = case, at
        self.embed = nn.Linear(5, HIDDEN)
        self.norm1, self.norm2, self.last = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN), nn.Linear(HIDDEN, 7)

    def put(self, at: str, x: Tensor) -> Tensor:
        return self.case(x) if at == self.at else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.put("stream", self.embed(x))
        y = self.put("scaled", self.norm1(x))
        q, k, v = (layer(y).view(BATCH, SEQ, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.put("keys", k), self.put("values", v), is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(BATCH, SEQ, HIDDEN))
        y = F.silu(F.linear(self.norm2(x), self.put("weight", self.up.weight), self.up.bias))
        return self.head(self.last(x + self.down(self.put("mlp", y))))


PLACES = ("stream", "scaled", "keys", "values", "weight", "mlp")


def filled(x: Tensor, part: Tensor) -> Tensor:
    """`part`, which is narrower than x or as wide, at the front of the channels of x."""
    return torch.cat([part.to(x.dtype), x[..., part.shape[-1] :]], -1)


def rows(x: Tensor, width: int, count: int = 2) -> Tensor:
    """Positions along the axis before the last, the same for `width` channels."""
    return torch.arange(count)[:, None].expand(*x.shape[:-2], count, width)


def uneven(n: int) -> Tensor:
    """How often each of n elements is repeated, n in total."""
    return torch.tensor([2, 0] + [1] * (n - 2))


NARROW: dict[str, Case] = {
    "narrow from the end": lambda x: torch.cat([x.narrow(-1, -4, 4), x[..., 4:]], -1),
    "narrow whole from the end": lambda x: x + x.narrow(-1, -x.shape[-1], x.shape[-1]),
    "narrow and back": lambda x: torch.cat([x.narrow(-1, 4, x.shape[-1] - 4), x.narrow(-1, -x.shape[-1], 4)], -1),
    "narrow of rows": lambda x: torch.cat([x.narrow(-2, -2, 2), x.narrow(-2, 0, x.shape[-2] - 2)], -2),
    "a slice beyond both ends": lambda x: x + x[..., -100:100],
    "a slice of none": lambda x: torch.cat([x[..., 100:], x, x[..., :-100]], -1),
    "the last slice": lambda x: filled(x, x[..., -4:]),
    "every second": lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    "every third from one": lambda x: filled(x, x[..., 1:-1:3]),
    "select from the end": lambda x: x * x.select(-1, -1).unsqueeze(-1),
    "pieces from the end": lambda x: torch.cat([x.split(5, -1)[-1], *x.split(5, -1)[:-1]], -1),
    "unbind from the end": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "unbind rows from the end": lambda x: torch.stack(x.unbind(-2)[::-1], -2),
    "tensor_split": lambda x: torch.cat(torch.tensor_split(x, [3, -2], -1)[::-1], -1),
    "chunks of uneven size": lambda x: torch.cat(x.chunk(3, -1)[::-1], -1),
    "flip both": lambda x: x.flip(-1, -2),
    "roll all": lambda x: x.roll(3),
    "roll channels and rows": lambda x: x.roll((1, 2), (-1, -2)),
    "swap by view": lambda x: x.reshape(-1).view(x.shape[-1], -1).T.reshape(x.shape),
    "view of other rows": lambda x: x.reshape(-1, 4).flip(0).reshape(x.shape),
    "diagonal": lambda x: x + torch.diagonal(x[..., :2, :2], 0, -2, -1).sum(-1)[..., None, None],
    "diagonal off": lambda x: x + torch.diagonal(x, 1, -2, -1).sum(-1)[..., None, None],
    "tril": lambda x: x.tril(1),
    "as_strided": lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride(), 0),
    "unfold": lambda x: x.unfold(-1, 4, 4).flatten(-2).flip(-1),
    "unfold overlapping": lambda x: filled(x, x.unfold(-1, 4, 2)[..., :1].flatten(-2)),
    "movedim": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}

WRITES: dict[str, Case] = {
    f"{how} of {width} channels": (
        lambda x, how=how, width=width: getattr(x, how)(
            -2, rows(x, width or x.shape[-1]), x.flip(-2) * 2, *(("sum",) if how == "scatter_reduce" else ())
        )
    )
    for how in ("scatter", "scatter_add", "scatter_reduce")
    for width in (1, 4, None)
} | {
    "scatter along channels": lambda x: x.scatter(-1, torch.zeros_like(x[..., :1], dtype=torch.long), x * 2),
    "scatter of expanded rows": lambda x: x.scatter(
        -2, torch.tensor([[1], [0]]).expand(*x.shape[:-2], 2, x.shape[-1]), x.flip(-2)[..., :2, :]
    ),
    "scatter, replaced rows": lambda x: x.scatter_reduce(-2, rows(x, x.shape[-1]), x, "sum", include_self=False),
    "scatter of means": lambda x: x.scatter_reduce(-2, rows(x, x.shape[-1]), x, "mean"),
    "scatter of products": lambda x: x.scatter_reduce(-2, rows(x, x.shape[-1]), x, "prod"),
    "gather narrow": lambda x: filled(x, x.gather(-2, rows(x, 4, x.shape[-2]).flip(-2))),
    "gather whole": lambda x: x.gather(-2, rows(x, x.shape[-1], x.shape[-2]).flip(-2)),
    "gather channels": lambda x: x.gather(-1, torch.arange(x.shape[-1]).flip(0).expand_as(x)),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.arange(x.shape[-1]).flip(0).expand_as(x), -1),
    "index_put of a few channels": lambda x: x.index_put((torch.zeros(1, dtype=torch.long),), x[:1] * 2, accumulate=True),
    "index_put at channels": lambda x: x.movedim(-1, 0).index_put((torch.tensor([2, 0]),), x.movedim(-1, 0)[:2]).movedim(0, -1),
    "index_put behind": lambda x: torch.ops.aten.index_put(x, [None] * (x.ndim - 1) + [torch.tensor([1, 0])], x[..., :2]),
    "index_put under a mask of rows and channels": lambda x: torch.ops.aten.index_put(
        x, [*[None] * (x.ndim - 2), torch.eye(x.shape[-2], x.shape[-1]).bool()], torch.tensor(2.0, dtype=x.dtype)
    ),
    "index_put under a mask of all": lambda x: torch.ops.aten.index_put(x, [x > 0], torch.tensor(0.5, dtype=x.dtype)),
    "index_add scaled": lambda x: x.index_add(-2, torch.tensor([1, 0]), x[..., :2, :], alpha=3),
    "index_add of channels": lambda x: x.index_add(-1, torch.tensor([1, 0]), x[..., :2], alpha=3),
    "index_copy": lambda x: x.index_copy(-2, torch.tensor([1, 0]), x[..., :2, :]),
    "index_copy of channels": lambda x: x.index_copy(-1, torch.tensor([1, 0]), x[..., :2]),
    "index_fill": lambda x: x.index_fill(-1, torch.tensor([1]), 0.0),
    "slice_scatter of rows": lambda x: torch.slice_scatter(x, x[..., 1:3, :], -2, -2),
    "slice_scatter of channels": lambda x: torch.slice_scatter(x, x[..., 1:3], -1, -2),
    "slice_scatter with steps": lambda x: torch.slice_scatter(x, x[..., :2, :], -2, 0, 4, 2),
    "select_scatter": lambda x: torch.select_scatter(x, x[..., 0, :], -2, -1),
    "select_scatter of channels": lambda x: torch.select_scatter(x, x[..., 0], -1, -1),
    "masked_scatter": lambda x: x.masked_scatter(torch.arange(x.shape[-2])[:, None] > 2, x * 2),
    "masked_scatter of channels": lambda x: x.masked_scatter(torch.arange(x.shape[-1]) > 2, x * 2),
    "uneven repeats of channels": lambda x: x.repeat_interleave(uneven(x.shape[-1]), -1, output_size=x.shape[-1]),
    "uneven repeats of rows": lambda x: x.repeat_interleave(uneven(x.shape[-2]), -2, output_size=x.shape[-2]),
    "repeats": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "tiles": lambda x: x.repeat(*[1] * (x.ndim - 1), 2)[..., 4 : 4 + x.shape[-1]],
    "index twice": lambda x: x[..., torch.tensor([0, 0, *range(2, x.shape[-1])])],
    "index with a permutation": lambda x: x[..., torch.arange(x.shape[-1]).flip(0)],
    "index from the end": lambda x: x[..., torch.arange(-x.shape[-1], 0)],
    "a mask of channels": lambda x: x * (torch.arange(x.shape[-1]) % 2),
    "a mask of rows": lambda x: x * (torch.arange(x.shape[-2]) % 2)[:, None],
    "a fill of channels": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 2 == 0, 0.0),
    "pad and cut": lambda x: F.pad(x, (2, -2)),
    "pad circular": lambda x: F.pad(x.reshape(1, -1, x.shape[-1]), (2, 0), mode="circular")[..., 2:].reshape(x.shape),
    "pad with ones": lambda x: F.pad(x, (0, 0, 1, -1), value=1.0),
}

ARGUMENTS: dict[str, Case] = {
    "a scaled sum": lambda x: torch.add(x, x.flip(-2), alpha=3),
    "a scaled difference": lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5),
    "a difference from twice the mean": lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2),
    "rsub": lambda x: torch.rsub(x, x.flip(-2), alpha=2),
    "floor division": lambda x: torch.div(x, 0.5, rounding_mode="floor"),
    "truncated division": lambda x: torch.div(x, x.new_ones(()), rounding_mode="trunc"),
    "floor_divide": lambda x: torch.floor_divide(x, 0.5),
    "remainder": lambda x: torch.remainder(x, 0.5),
    "addcmul": lambda x: torch.addcmul(x, x.new_ones(1) * 2, x.flip(-2), value=3),
    "addcmul of channels": lambda x: torch.addcmul(x, x, x.flip(-1), value=3),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.square() + 1, value=3),
    "lerp": lambda x: torch.lerp(x, x.flip(-2), 0.3),
    "baddbmm": lambda x: torch.baddbmm(x.reshape(1, -1, x.shape[-1]), x.reshape(1, -1, x.shape[-1]),
        torch.eye(x.shape[-1], dtype=x.dtype)[None].flip(-1), beta=0.5, alpha=2).reshape(x.shape),
    "beta nought": lambda x: torch.addmm(x.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]),
        torch.eye(x.shape[-1], dtype=x.dtype), beta=0).reshape(x.shape),
    "cumsum of rows": lambda x: x.cumsum(-2),
    "cumsum of channels": lambda x: x.cumsum(-1),
    "cumsum to integers": lambda x: (x * 9).cumsum(-2, dtype=torch.int64).to(x.dtype),
    "sum to integers": lambda x: x + (x * 9).sum(-2, keepdim=True, dtype=torch.int64),
    "sum of squares to integers": lambda x: x / (1 + (x * 3).square().sum(-1, keepdim=True, dtype=torch.int64)),
    "squares to integers": lambda x: x / (1 + ((x * 3).square().to(torch.int32)).sum(-1, keepdim=True)),
    "mean to half": lambda x: x - x.mean(-1, keepdim=True, dtype=torch.float32),
    "norm to float": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)),
    "norm of all": lambda x: x / (1 + torch.linalg.vector_norm(x)),
    "norm of rows": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=-2, keepdim=True)),
    "norm of both": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)),
    "third norm": lambda x: x / (1 + torch.linalg.vector_norm(x, ord=3, dim=-1, keepdim=True)),
    "std": lambda x: x / (1 + x.std(-1, keepdim=True)),
    "var with correction": lambda x: x / (1 + x.var(-1, correction=3, keepdim=True)),
    "complex": lambda x: (x * 1j).imag,
    "complex channels": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2),
    "conjugate": lambda x: torch.complex(x, x).conj().imag,
    "to complex": lambda x: x.to(torch.complex128).real + 0,
    "integers": lambda x: (x * 9).to(torch.int64).to(x.dtype),
    "integers by type": lambda x: (x * 9).type(torch.int32).to(x.dtype),
    "bools": lambda x: x.to(torch.bool).to(x.dtype) + x,
    "float8": lambda x: x.to(torch.float8_e4m3fn).to(x.dtype),
    "float8, moved": lambda x: x.to(torch.float8_e5m2).flip(-2).to(x.dtype),
    "bits": lambda x: x.view(torch.int64).view(x.dtype),
    "bits halved": lambda x: x.contiguous().view(torch.float32).flip(-1).to(x.dtype)[..., ::2],
    "einsum diagonal": lambda x: x + torch.einsum("...ii->...i", x[..., :2, :2]).sum(-1)[..., None, None],
    "einsum of a broadcast axis": lambda x: torch.einsum("...i,i->...i", x, x.new_full((1,), 2.0)),
    "einsum contracts a broadcast axis": lambda x: x + torch.einsum("...i,i->...", x, x.new_full((1,), 2.0))[..., None],
    "einsum sums": lambda x: x + torch.einsum("...ij->...j", x)[..., None, :],
    "layer_norm of two axes": lambda x: F.layer_norm(x, x.shape[-2:]),
    "layer_norm with a scale that is made": lambda x: F.layer_norm(x, x.shape[-1:], x.flatten()[: x.shape[-1]], eps=0.1),
    "rms_norm with a scale that is made": lambda x: F.rms_norm(x, x.shape[-1:], x.flatten()[: x.shape[-1]], 0.1),
    "layer_norm with a large eps": lambda x: F.layer_norm(x, x.shape[-1:], eps=2.0),
    "rms_norm without eps": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x.reshape(-1, x.shape[-1], 1), 2).reshape(x.shape),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize rows": lambda x: F.normalize(x, dim=-2),
    "softmax": lambda x: x.softmax(-1),
    "softmax of rows": lambda x: x.softmax(-2),
    "where of channels": lambda x: torch.where(torch.arange(x.shape[-1]) > 3, x, 0.0),
    "where of rows": lambda x: torch.where((torch.arange(x.shape[-2]) > 2)[:, None], x, x.new_zeros(())),
    "where of values": lambda x: torch.where(x > 0, x, 0.0),
    "reciprocal by division": lambda x: x.new_ones(1) / (x.square() + 1),
    "clamp": lambda x: x.clamp(-0.5),
    "full_like": lambda x: x + torch.full_like(x, 0.5),
    "fill with a value": lambda x: x + torch.fill(x, x.flatten()[0]),
    "an added number": lambda x: x + 1,
    "an added row": lambda x: x + torch.arange(x.shape[-1]) / 9,
    "added positions": lambda x: x + (torch.arange(x.shape[-2] * x.shape[-1]) / 9).view(x.shape[-2:]),
    "a number for each row": lambda x: x * (torch.arange(x.shape[-2])[:, None] + 1.0),
    "a number for each channel": lambda x: x * (torch.arange(x.shape[-1]) + 1.0),
    "a scale that is expanded": lambda x: x * (torch.arange(x.shape[-1]) + 1.0).expand_as(x),
    "attention with scale": lambda x: F.scaled_dot_product_attention(x, x.flip(-2), x, scale=0.3),
    "attention, causal": lambda x: F.scaled_dot_product_attention(x.flip(-2), x, x, is_causal=True),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[..., : x.shape[-2]]),
    "mT": lambda x: x.mT.contiguous().mT,
    "moveaxis": lambda x: torch.moveaxis(torch.moveaxis(x, -1, 0) * 2, 0, -1),
    "inner": lambda x: torch.inner(x, torch.eye(x.shape[-1], dtype=x.dtype).flip(0)),
    "tensordot": lambda x: torch.tensordot(x, torch.eye(x.shape[-1], dtype=x.dtype).flip(0), 1),
    "kron": lambda x: torch.kron(x, x.new_ones(1)),
    "outer": lambda x: x + torch.outer(x.flatten()[:2], x.flatten()[2:4]).sum(),
    "linalg.norm": lambda x: x / (1 + torch.linalg.norm(x, dim=-1, keepdim=True)),
    "linalg.matrix_norm": lambda x: x / (1 + torch.linalg.matrix_norm(x, keepdim=True)),
    "cdist": lambda x: x + torch.cdist(x, x.flip(-2)).mean(-1, keepdim=True),
    "cosine_similarity": lambda x: x * F.cosine_similarity(x, x.flip(-2), dim=-1)[..., None],
    "a vector for a weight": lambda x: x + F.linear(x, x.flatten()[: x.shape[-1]])[..., None],
}

CASES = NARROW | WRITES | ARGUMENTS


def places() -> Iterator[tuple[str, str]]:
    """Each case on the stream and at one more place, in turn; `pytest -m slow` tries all."""
    others = cycle(PLACES[1:])
    for name in CASES:
        yield name, "stream"
        yield name, next(others)


@pytest.mark.slow
@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_function_or_a_reason_everywhere(name: str, at: str) -> None:
    test_the_same_function_or_a_reason(name, at)


@pytest.mark.parametrize(("name", "at"), places())
def test_the_same_function_or_a_reason(name: str, at: str) -> None:
    torch.manual_seed(0)
    model, x = made(Block(CASES[name], at)), torch.randn(BATCH, SEQ, 5, dtype=torch.float64)
    try:
        program = exported(model, (x,))
    except Exception as error:  # the case makes no sense at this place
        pytest.skip(f"torch does not export it: {type(error).__name__}")
    check(program, x)
