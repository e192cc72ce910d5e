"""Gradients are the same whether values are kept or computed again, and little is kept where they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.export import Dim, ExportedProgram

from spinpass.execution import constants
from spinpass.execution import recomputed as module
from spinpass.execution.recomputed import first_output
from tests.support import models


@cache
def program() -> ExportedProgram:
    return models.export_hf_cache(models.build("llama_tied"))


class Deep(nn.Module):
    """Two values live from one layer to the next; the last output reads none of them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        for layer in self.layers:
            wide = torch.cat([layer(x), y, y, y], -1).tanh()
            x, y = x + wide[..., :16], y * wide[..., 16:32].sin()
        return x @ y.mT, torch.ones(3)


def deep(layers: int = 24) -> tuple[ExportedProgram, dict[str, Any]]:
    x = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(1))
    ep = torch.export.export(Deep(layers), (x,), dynamic_shapes=({1: Dim("n")},))
    return ep, {"x": x}


def gradients(ep: ExportedProgram, values: dict[str, Any], most: int) -> tuple[Tensor, dict[str, Tensor], int]:
    """The output, its gradients, and how many bytes were kept for them that are no constants."""
    moving = {n: t.detach().clone().requires_grad_() for n, t in constants(ep).items() if isinstance(t, Tensor) and t.is_floating_point()}
    fixed = {t.untyped_storage().data_ptr() for t in moving.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in fixed:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        found = first_output(ep, values | moving, most=most)
    size = sum(kept.values())
    found.square().mean().backward()
    return found.detach(), {n: t.grad for n, t in moving.items() if t.grad is not None}, size


def test_gradients_are_the_same_and_less_is_kept() -> None:
    ep, values = deep()
    plain, wanted, kept = gradients(ep, values, 1 << 40)
    again, found, fewer = gradients(ep, values, 0)
    assert torch.equal(plain, again) and found.keys() == wanted.keys() and len(wanted) == 48
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert fewer < kept / 3, (fewer, kept)


def test_stretches_begin_between_layers() -> None:
    """Where they did begin at random, the wide values in the middle of a layer would be kept."""
    ep, values = deep()
    nodes = module.nodes_behind(module.main_output(ep), ep.graph.nodes)
    sizes = module.bound_sizes(module.user_inputs(ep), values)
    cuts = module._cuts(nodes, module.main_output(ep), sizes, 0)
    live = list(module.live_bytes(nodes, module.main_output(ep), [module.node_bytes(node, sizes) for node in nodes]))
    two = 2 * values["x"].nbytes
    assert 8 <= len(cuts) <= 24 and {live[cut] for cut in cuts} == {two}
    assert not module._cuts(nodes, module.main_output(ep), sizes, 1 << 30)


def test_a_decoder_with_a_cache_has_the_same_gradients() -> None:
    from spinpass.execution import synthetic_inputs

    values = synthetic_inputs(program())
    plain, wanted, kept = gradients(program(), values, 1 << 40)
    again, found, fewer = gradients(program(), values, 0)
    assert torch.equal(plain, again) and wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-6, atol=0) for name in wanted)
    assert fewer < kept


def test_a_program_that_writes_in_place_is_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, :1] = 0
            return y.sin()

    x = torch.randn(3, 4)
    ep = torch.export.export(Writes(), (x,))
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: pytest.fail("it would write twice"))
    assert torch.equal(first_output(ep, {"x": x}, most=0), Writes()(x))


def test_what_is_no_value_of_a_node_is_returned() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    x = torch.randn(3)
    ep = torch.export.export(Same(), (x,))
    assert torch.equal(first_output(ep, {"x": x}, most=0), x)
