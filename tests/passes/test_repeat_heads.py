"""Attentions whose queries are grouped, written with repeated heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ExportError
from spinpass.passes import repeat_heads


class Attention(nn.Module):
    def __init__(self, queries: int, keys: int, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, heads * 4, bias=False, dtype=torch.float64) for heads in (queries, keys, keys))
        self.o = nn.Linear(queries * 4, 8, bias=False, dtype=torch.float64)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (layer(x).view(batch, tokens, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1))


def exported(module: nn.Module) -> ExportedProgram:
    axes = ({0: Dim("batch", max=64), 1: Dim("tokens", max=64)},)
    return torch.export.export(module, (torch.zeros(2, 5, 8, dtype=torch.float64),), dynamic_shapes=axes)


def attentions(program: ExportedProgram) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if "scaled_dot_product_attention" in str(n.target)]


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.125}])
def test_the_same_values_with_repeated_heads(heads: tuple[int, int], options: dict[str, Any]) -> None:
    program = exported(Attention(*heads, **options))
    changed = repeat_heads(program)
    (before,), (after,) = attentions(program), attentions(changed)
    assert before.kwargs["enable_gqa"] and not after.kwargs.get("enable_gqa")
    assert {n.meta["val"].shape[1] for n in after.args[:3]} == {heads[0]}  # type: ignore[union-attr]
    for batch, tokens in ((2, 5), (3, 7)):
        x = torch.randn(batch, tokens, 8, dtype=torch.float64)
        torch.testing.assert_close(changed.module()(x), program.module()(x), rtol=1e-13, atol=1e-13)


def test_a_program_without_groups_is_returned_itself_and_a_record_is_kept() -> None:
    program = exported(nn.Sequential(nn.RMSNorm(8, dtype=torch.float64), Attention(4, 2)))
    rotated = spinpass.transform(program, spinpass.RotationConfig(kind="random-hadamard"))
    changed = repeat_heads(rotated)
    assert record.read(changed) == record.read(rotated) is not None
    assert repeat_heads(changed) is changed


def test_heads_of_dynamic_number_are_refused() -> None:
    class Open(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    heads = Dim("heads", min=2, max=8)
    given = torch.zeros(1, 4, 5, 4), torch.zeros(1, 2, 5, 4)
    program = torch.export.export(Open(), given, dynamic_shapes=({1: 2 * heads}, {1: heads}))
    with pytest.raises(ExportError, match="make both numbers static"):
        repeat_heads(program)
