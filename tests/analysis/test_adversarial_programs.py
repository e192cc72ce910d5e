"""Whole programs of the kinds that have gone wrong: random values, states, regions, caches, packed weights, shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

import spinpass
from spinpass.errors import ProgramError, QuantizedWeightError
from tests.support.decoders import exported, made
from tests.support.exactness import check

N, FFN, SEQ, BATCH = 16, 24, 6, 2
X = torch.randn(BATCH, SEQ, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Stream(nn.Module):
    """Two MLPs on a residual stream. Subclasses put something in between."""

    norm: Callable[[int], nn.Module] = staticmethod(nn.RMSNorm)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(N, N, bias=False), nn.Linear(N, 7)
        self.norms = nn.ModuleList(self.norm(N) for _ in range(3))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*s) for _ in range(2)) for s in ((N, FFN), (FFN, N)))
        self.prepare()

    def prepare(self) -> None:
        """Make further parameters and buffers."""

    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight

    def normed(self, x: Tensor, layer: int) -> Tensor:
        return self.norms[layer](x)

    def between(self, x: Tensor) -> Tensor:
        return x

    def layer(self, x: Tensor, layer: int) -> Tensor:
        h = F.linear(self.normed(x, layer), self.weight(layer), self.ups[layer].bias)
        return x + self.downs[layer](F.gelu(h))

    def forward(self, x: Tensor) -> Any:
        x = self.between(self.layer(self.embed(x), 0))
        return self.head(self.norms[2](self.layer(x, 1)))


class PositionsAfterTheNorm(Stream):
    """Positions (S, N) that a norm's scale cannot be moved past."""

    def prepare(self) -> None:
        self.positions = nn.Parameter(torch.randn(SEQ, N))

    def normed(self, x: Tensor, layer: int) -> Tensor:
        return self.norms[layer](x) + self.positions


class OnePositionAfterTheNorm(PositionsAfterTheNorm):
    def prepare(self) -> None:
        self.positions = nn.Parameter(torch.randn(1, N))


class NumberAfterTheNorm(PositionsAfterTheNorm):
    def prepare(self) -> None:
        self.positions = nn.Parameter(torch.randn(()))


class PositionsAfterALayerNorm(PositionsAfterTheNorm):
    norm = staticmethod(nn.LayerNorm)


class MovedIntoTheSum(Stream):
    """A LayerNorm's bias in front of a product that has the residual for summand."""

    norm = staticmethod(nn.LayerNorm)

    def layer(self, x: Tensor, layer: int) -> Tensor:
        flat = x.flatten(0, 1)
        h = torch.addmm(flat[:, :1].expand(-1, FFN), self.norms[layer](flat), self.ups[layer].weight.T)
        return torch.addmm(flat, F.gelu(h), self.downs[layer].weight.T).view_as(x)


class ScaleThatIsMade(Stream):
    """A norm whose scale depends on the input."""

    def normed(self, x: Tensor, layer: int) -> Tensor:
        return F.rms_norm(x, (N,), self.norms[layer].weight * x.mean())


class ShiftThatIsMade(Stream):
    norm = staticmethod(nn.LayerNorm)

    def normed(self, x: Tensor, layer: int) -> Tensor:
        return F.layer_norm(x, (N,), self.norms[layer].weight, self.norms[layer].bias * x.mean())


class Noise(Stream):
    """A weight with noise of its own each time."""

    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight + 0 * torch.randn_like(self.ups[layer].weight)


class Masked(Stream):
    """A weight that is pruned by a mask of bytes."""

    def prepare(self) -> None:
        self.register_buffer("kept", (torch.arange(FFN * N).view(FFN, N) % 3 > 0).to(torch.uint8))

    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight * self.kept


class MaskedByTruth(Masked):
    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight.masked_fill(self.kept == 0, 0.0)


class Reordered(Stream):
    """A weight whose rows and columns are gathered by int32."""

    def prepare(self) -> None:
        self.register_buffer("order", torch.arange(N).flip(0).int())
        self.register_buffer("rows", torch.arange(FFN).roll(3).int())

    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight[self.rows][:, self.order]


class Float8(Stream):
    """A weight of 8 bits and its scale."""

    def prepare(self) -> None:
        self.register_buffer("codes", torch.randn(FFN, N).to(torch.float8_e4m3fn))
        self.scale = nn.Parameter(torch.randn(FFN, 1))

    def weight(self, layer: int) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale


class Float8InBetween(Stream):
    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight.to(torch.float8_e4m3fn).to(self.ups[layer].weight.dtype)


class NarrowWeight(Stream):
    def weight(self, layer: int) -> Tensor:
        return torch.cat([self.ups[layer].weight.narrow(0, -8, 8), self.ups[layer].weight.narrow(0, 0, FFN - 8)])


class WithoutGradients(Stream):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x, 0)


class EnabledGradients(Stream):
    def between(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.layer(x, 0)


class WithoutAutocast(Stream):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layer(x, 0)


class Mapped(Stream):
    """vmap leaves calls in a graph that have no users and cannot be left out."""

    def between(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.layer(row, 0))(x)


class AssociativeScan(Stream):
    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.associative_scan import associative_scan

        return associative_scan(lambda a, b: a * 0.5 + b, x, 1, combine_mode="generic")


class Scan(Stream):
    """A loop over layers, which is not looked into."""

    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        weights = torch.stack([self.downs[0].weight[:, :N], self.downs[1].weight[:, :N]])

        def step(carry: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            carry = carry + (carry @ weight).relu()
            return carry, carry.sum()

        return scan(step, x, weights)[0]


class Branch(Stream):
    def between(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


class Transposed(Stream):
    def weight(self, layer: int) -> Tensor:
        return self.ups[layer].weight.mT.contiguous().mT

    def between(self, x: Tensor) -> Tensor:
        return x + torch.inner(F.gelu(self.ups[0](self.norms[0](x))), self.downs[0].weight)


class Dotted(Stream):
    def between(self, x: Tensor) -> Tensor:
        h = torch.tensordot(torch.moveaxis(self.norms[0](x), -1, 0), self.ups[0].weight, ([0], [1]))
        return x + self.downs[0](F.gelu(h))


PROGRAMS = {
    c.__name__: c
    for c in (
        *(PositionsAfterTheNorm, OnePositionAfterTheNorm, NumberAfterTheNorm, PositionsAfterALayerNorm),
        *(MovedIntoTheSum, ScaleThatIsMade, ShiftThatIsMade, Noise, Masked, MaskedByTruth, Reordered),
        *(Float8, Float8InBetween, NarrowWeight, WithoutGradients, EnabledGradients, WithoutAutocast, Mapped),
        *(AssociativeScan, Scan, Branch, Transposed, Dotted),
    )
}
# in which the residual stream is rotated offline
WHOLE = {
    *("OnePositionAfterTheNorm", "Masked", "MaskedByTruth", "Reordered", "NarrowWeight", "Transposed", "Dotted"),
    *("WithoutGradients", "EnabledGradients", "WithoutAutocast", "Mapped"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_function(name: str, dynamic: bool) -> None:
    options = {"dynamic_shapes": {"x": {0: Dim.AUTO, 1: Dim.AUTO}}} if dynamic else {}
    program = export(made(PROGRAMS[name]()), (X,), **options)  # with gradients, as users do: that makes regions
    result = check(program, X)
    plan = spinpass.plan(program, spinpass.RotationConfig(verify=False))
    assert result is not None, plan
    if name in WHOLE:
        assert any(s.role == "R1" and s.form == "offline" and not s.online for s in plan.spaces), plan


def planned(program: Any) -> spinpass.RotationPlan:
    return spinpass.plan(program, spinpass.RotationConfig(verify=False))


def test_what_is_random_is_no_constant() -> None:
    result = check(exported(made(Noise()), (X,)), X)
    assert result is not None
    drawn = [n for n in result.graph.nodes if "randn_like" in str(n.target)]
    assert len(drawn) == 2, "the noise was drawn once and stored"


def test_weights_of_8_bits_stay_what_they_are() -> None:
    program = exported(made(Float8()), (X,))
    result = check(program, X)
    assert result is not None
    kept = [k for k, t in result.state_dict.items() if t.dtype == torch.float8_e4m3fn]
    for name in kept:
        assert torch.equal(result.state_dict[name].view(torch.uint8), program.state_dict[name].view(torch.uint8))


class Quantized(Masked):
    """Codes of a byte each, a scale and a zero point for each row."""

    def prepare(self) -> None:
        self.register_buffer("codes", torch.randint(0, 255, (FFN, N), dtype=torch.uint8))
        self.scale, self.zero = nn.Parameter(torch.randn(FFN, 1)), nn.Parameter(torch.randn(FFN, 1))

    def weight(self, layer: int) -> Tensor:
        return (self.codes.to(self.scale.dtype) - self.zero) * self.scale


def test_masks_and_orders_are_no_quantized_weights_but_codes_are() -> None:
    with pytest.raises(QuantizedWeightError, match="codes is a quantized or packed weight"):
        planned(exported(made(Quantized()), (X,)))


class Counting(Stream):
    """A state that the program updates."""

    def prepare(self) -> None:
        self.register_buffer("seen", torch.zeros(SEQ, N))

    def between(self, x: Tensor) -> Tensor:
        self.seen.add_(x[0].detach())
        return x + self.seen.mean()


def test_programs_do_not_share_a_state() -> None:
    program = exported(made(Counting()), (X,))
    result = check(program, X)
    assert result is not None
    seen = program.state_dict["seen"].clone()
    ran = result.module()(X)
    assert torch.equal(program.state_dict["seen"], seen)
    assert result.state_dict["seen"].data_ptr() != program.state_dict["seen"].data_ptr()
    assert ran.shape == (BATCH, SEQ, 7)


class Autocast(Stream):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x, 0)


def test_autocast_is_traced_through() -> None:
    x = X.float()
    program = exported(made(Autocast(), dtype=torch.float32), (x,))
    assert any("autocast" in str(n.target) for n in program.graph.nodes)
    result = check(program, x, within=0.05)
    assert result is not None
    assert any(s.role == "R1" for s in planned(program).spaces), planned(program)
    assert not any("autocast" in str(n.target) for n in result.graph.nodes)


@pytest.mark.parametrize(("kind", "name"), [(Scan, "scan"), (Branch, "cond")])
def test_a_loop_or_branch_is_named(kind: type[Stream], name: str) -> None:
    plan = planned(exported(made(kind()), (X,)))
    assert any(r.what.startswith(name) and "not looked into" in r.why for r in plan.refusals), plan


def test_what_cannot_be_traced_through_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(made(Autocast(), dtype=torch.float32), (X.float(),))

    def fails(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", fails)
    with pytest.raises(ProgramError, match="under autocast, no_grad or vmap in the program cannot be traced"):
        planned(program)


class Decoding(nn.Module):
    """Attention over a cache that is written by a scatter whose index is as wide as a key, or narrower."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.width, self.how = width, how
        self.q, self.k, self.v, self.o = (nn.Linear(N, N, bias=False) for _ in range(4))
        self.register_buffer("keys", torch.randn(BATCH, 9, N))
        self.register_buffer("values", torch.randn(BATCH, 9, N))

    def written(self, cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
        index = at[:, :, None].expand(-1, -1, self.width)
        if self.how == "index_put":
            return torch.ops.aten.index_put(cache, [None, at[0]], x)
        return getattr(cache, self.how)(1, index, x)

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.written(self.keys, self.k(x), at), self.written(self.values, self.v(x), at)
        y = F.scaled_dot_product_attention(*(t[:, None] for t in (self.q(x), k, v)))[:, 0]
        return self.o(y), k * 1, v * 1


@pytest.mark.parametrize("how", ["scatter", "scatter_add", "index_put"])
@pytest.mark.parametrize("width", [1, 8, N])
def test_caches_that_are_written_by_a_scatter(how: str, width: int) -> None:
    at = torch.arange(2, 2 + SEQ).expand(BATCH, -1)
    program = exported(made(Decoding(width, how)), (X, at))
    result = check(program, X, at)
    if how != "index_put" and width != N and result is not None:
        assert not any(s.role == "R2" for s in planned(program).spaces)


def test_what_is_decomposed_keeps_its_name_and_its_module() -> None:
    program = exported(made(Transposed()), (X,))
    (before,) = [n for n in program.graph.nodes if "inner" in str(n.target)]
    result = check(program, X)
    assert result is not None
    (after,) = [n for n in result.graph.nodes if n.name == before.name]
    assert "inner" not in str(after.target) and after.meta["nn_module_stack"] == before.meta["nn_module_stack"]
