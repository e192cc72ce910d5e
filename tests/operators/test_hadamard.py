import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spinpass.errors import ConfigError
from spinpass.operators import hadamard as library
from spinpass.rotations import hadamard

hadamard_op = torch.ops.spinpass.hadamard.default


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 7)

    def forward(self, x: Tensor) -> Tensor:
        rotated: Tensor = self.linear(torch.ops.spinpass.hadamard(x.sin(), 96))
        return rotated


@pytest.fixture
def exported() -> Any:
    torch.manual_seed(0)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    return torch.export.export(Rotated(), (torch.randn(4, 96),), dynamic_shapes={"x": {0: tokens}})


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", [12, 48, 96])
def test_the_op_computes_its_definition(order: int, transpose: bool) -> None:
    x = torch.randn(2, 3, 96, dtype=torch.float64)
    result = hadamard_op(x, order, transpose)
    assert torch.allclose(result, library.reference(x, order, transpose), atol=1e-12)
    assert torch.equal(result, hadamard.hadamard_transform(x, order, transpose=transpose))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    gradient = dtype in (torch.float32, torch.float64)
    samples = [torch.randn(3, 96).to(dtype), torch.randn(96, 3).to(dtype).t(), torch.randn(0, 96).to(dtype)]
    for x in samples:
        torch.library.opcheck(hadamard_op, (x.requires_grad_(gradient), 96, True))


def test_gradient_is_the_inverse_op() -> None:
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: hadamard_op(t, 20), (x,))
    assert torch.autograd.gradgradcheck(lambda t: hadamard_op(t, 20, True), (x,))
    seed = torch.randn(2, 40, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(hadamard_op(x, 20), x, seed)
    assert torch.equal(gradient, hadamard_op(seed, 20, True))


def test_fake_kernel_promises_what_the_real_one_gives() -> None:
    x = torch.randn(5, 96).t().reshape(3, 5, 32).transpose(0, 1)
    with FakeTensorMode() as mode:
        fake = hadamard_op(mode.from_tensor(x), 32)
        with pytest.raises(ConfigError, match="order 64 does not divide axis -1"):
            hadamard_op(mode.from_tensor(x), 64)
    real = hadamard_op(x, 32)
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


def test_the_real_kernel_refuses_what_the_fake_one_does() -> None:
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 6 can be built"):
        hadamard_op(torch.randn(2, 6), 6)


def test_autocast_does_not_lower_the_precision() -> None:
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard_op(x, 96), hadamard.hadamard_transform(x, 96))


def count_ops(program: Any) -> int:
    return sum(node.target is hadamard_op for node in program.graph.nodes)


def test_one_node_survives_every_journey_of_a_program(exported: Any, tmp_path: Path) -> None:
    x = torch.randn(9, 96)
    expected = exported.module()(x)
    torch.export.save(exported, tmp_path / "program.pt2")
    journeys = {
        "saved": torch.export.load(tmp_path / "program.pt2"),
        "copied": copy.deepcopy(exported),
        "decomposed": exported.run_decompositions(),
        "functionalised": exported.run_decompositions({}),
        "exported again": torch.export.export(exported.module(), (torch.randn(9, 96),)),
    }
    for name, program in journeys.items():
        assert count_ops(program) == 1, name
        assert torch.allclose(program.module()(x), expected, atol=1e-6), name


def test_compiled_module_agrees(exported: Any) -> None:
    x = torch.randn(9, 96)
    compiled = torch.compile(exported.module(), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), exported.module()(x), atol=1e-6)  # type: ignore[no-untyped-call]  # GraphModule


def test_compiled_gradient_agrees() -> None:
    model, x = Rotated(), torch.randn(9, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5)
