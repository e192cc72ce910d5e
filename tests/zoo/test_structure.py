"""What the coverage counts: places that a rotation can reach, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import spinpass
from benchmarks.zoo.structure import Structure, structure_of
from tests.support.decoders import HEADS, HIDDEN, Attention, Decoder, exported, made


class Gated(Decoder):
    """A second attention whose result, or whose values, :meth:`twist` changes."""

    def prepare(self) -> None:
        self.a2, self.gate = Attention(self.s), nn.Linear(HIDDEN, HEADS * self.s.head)

    def twist(self, h: Tensor, values: Tensor, result: Tensor | None) -> Tensor:
        raise NotImplementedError

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        q, k, v = self.a2.project(h)
        y = F.scaled_dot_product_attention(q, k, self.twist(h, v, None), enable_gqa=True)
        return x + self.a2.o(self.twist(h, v, y.transpose(1, 2).flatten(2)))


class PerChannel(Gated):
    def twist(self, h: Tensor, values: Tensor, result: Tensor | None) -> Tensor:
        return values if result is None else result * self.gate(h).sigmoid()


class PerHead(Gated):
    def twist(self, h: Tensor, values: Tensor, result: Tensor | None) -> Tensor:
        if result is None:
            return values
        gates = self.gate(h)[..., :HEADS, None].sigmoid()
        return (result.unflatten(-1, (HEADS, -1)) * gates).flatten(2)


class Activated(Gated):
    def twist(self, h: Tensor, values: Tensor, result: Tensor | None) -> Tensor:
        return F.silu(values) if result is None else result


class Normed(Gated):
    def twist(self, h: Tensor, values: Tensor, result: Tensor | None) -> Tensor:
        return values if result is None else F.rms_norm(result, result.shape[-1:])


def counted(module: Decoder) -> tuple[Structure, dict[str, Any]]:
    program = exported(made(module))
    structure = structure_of(program)
    return structure, dict(structure.covered(spinpass.plan(program)))


@pytest.mark.parametrize(
    ("module", "why"), [(PerChannel, "a product of two computed values"), (Activated, "aten::silu of every channel")]
)
def test_values_behind_a_barrier_are_not_counted(module: type[Gated], why: str) -> None:
    structure, covered = counted(module())
    assert structure.counts()["R2"] == covered["R2"] == 1
    assert [reason.startswith(why) for reason in structure.barriers().values()] == [True]


@pytest.mark.parametrize("module", [PerHead, Normed])
def test_what_values_can_pass_is_no_barrier(module: type[Gated]) -> None:
    structure, covered = counted(module())
    assert not structure.barriers()
    assert structure.counts()["R2"] == covered["R2"] == 2


def test_a_place_that_the_plan_leaves_out_is_missed() -> None:
    program = exported(made(Decoder(layers=2)))
    plan = spinpass.plan(program)
    some = plan.without("R2:blocks.1.attn", "R3:blocks.0.attn")
    assert structure_of(program).covered(some) == {"R2": 1, "R3": 1, "R4": 2}
    assert structure_of(program).counts() == structure_of(program).covered(plan)
