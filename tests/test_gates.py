"""Channels between layers that are computed one by one take an order, and scales where the result is linear in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig
from spinpass.analysis.patterns import gates
from spinpass.certificate.programs import run, synthetic_inputs
from spinpass.errors import ConfigError, VerificationError
from spinpass.passes import fold
from tests.support import models
from tests.support.decoders import relative_error
from tests.support.programs import program

EXACT = 1e-9
SCALES = (0.5 * torch.randn(models.FFN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).exp()
ORDER = torch.randperm(models.FFN, generator=torch.Generator().manual_seed(1))


def given(matrix: Tensor | Rotation, rotations: str = "gates", **settings: Any) -> RotationConfig:
    return RotationConfig(rotations=rotations, matrices={"gates": matrix}, **settings)  # type: ignore[arg-type]


def error(before: ExportedProgram, after: ExportedProgram) -> float:
    inputs = synthetic_inputs(before, seed=3)
    return relative_error(run(before, inputs, float64=True), run(after, inputs, float64=True))


@pytest.mark.parametrize("name", ["llama", "llama_bias", "gemma2", "phi3"])
def test_scales_go_to_one_side_of_the_product_and_their_inverse_behind_it(name: str) -> None:
    before = program(name)
    found = spinpass.rotate(before, given(SCALES))
    assert found.certificate is not None and found.certificate.ok and error(before, found.program) < EXACT
    names = {key.split(".")[-2] for s in found.plan.spaces for key in (*s.writers, *s.readers)}
    assert names == ({"gate_up_proj", "down_proj"} if name == "phi3" else {"up_proj", "down_proj"})
    assert {(s.role, s.form, s.group, str(s.rotation)) for s in found.plan.spaces} == {
        ("gates", "offline", "diagonal", f"diagonal({models.FFN})")
    }
    down = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(found.program.state_dict[down], before.state_dict[down] / SCALES)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "opt", "phi3", "gpt_neox"])
def test_an_order_of_channels_goes_through_every_activation(name: str) -> None:
    before = program(name)
    found = spinpass.rotate(before, given(ORDER, rotations="R1,gates,R4"))
    assert found.certificate is not None and found.certificate.ok and error(before, found.program) < EXACT
    roles = [s.role for s in found.plan.spaces]
    assert roles.count("gates") == roles.count("R4") == models.LAYERS  # a Hadamard on top of what is in order


def test_an_order_is_what_it_says() -> None:
    before = program("opt")
    after = spinpass.transform(before, given(ORDER))
    for name, tensor in after.state_dict.items():
        was = before.state_dict[name]
        expected = was[ORDER] if ".fc1." in name else was[:, ORDER] if ".fc2.weight" in name else was
        assert torch.equal(tensor, expected), name


def test_the_plan_says_what_gates_take() -> None:
    plan = spinpass.plan(program("llama"), RotationConfig(rotations="gates"))
    assert not plan.spaces
    assert "gates:model.layers.0.mlp.down_proj: it takes a scale for each channel (a vector), or an order" in str(plan)
    assert "it takes an order of channels (integers) of yours" in str(
        spinpass.plan(program("opt"), RotationConfig(rotations="gates"))
    )
    made = spinpass.plan(program("llama"), given(SCALES))
    assert "gates offline admits diagonal matrices: it is linear in one operand" in str(made)
    again = spinpass.RotationPlan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.spaces == made.spaces
    after, other = (spinpass.transform(program("llama"), each) for each in (given(SCALES), again))
    assert all(torch.equal(after.state_dict[name], other.state_dict[name]) for name in after.state_dict)


class Between(nn.Module):
    """Two layers, and something between them that treats channels differently, or somebody else who reads them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.e, self.g, self.u = how, nn.Embedding(40, 16), nn.Linear(16, 24), nn.Linear(16, 24)
        self.d, self.h, self.c = nn.Linear(24, 16), nn.Linear(16, 40), nn.Parameter(torch.randn(24))

    def forward(self, ids: Tensor) -> Any:
        x = self.e(ids)
        g, u = self.g(x), (self.g if self.how == "one weight" else self.u)(x)
        if self.how == "vector inside":
            g = torch.tanh(torch.sigmoid(g) + self.c)
        if self.how == "cast":
            g = g.to(torch.float64)  # exported with an assertion that reads it, too
        if self.how == "softmax":
            g = torch.softmax(g, -1)
        h = nn.functional.silu(g) * u
        if self.how == "squared":
            h = h * u
        if self.how == "sum":
            h = nn.functional.silu(g) * (u + 1)
        out = self.h(x + self.d(h))
        return (out, u) if self.how == "operand out" else (out, h) if self.how == "result out" else out


def between(how: str) -> ExportedProgram:
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    return torch.export.export(Between(how).double().eval(), (ids,))


@pytest.mark.parametrize(
    ("how", "admits"),
    [("plain", "diagonal"), ("cast", "diagonal"), ("squared", "permutation"), ("sum", "permutation"), ("one weight", "permutation"), ("vector inside", ""), ("softmax", ""),
     ("operand out", ""), ("result out", "")],
)  # fmt: skip
def test_what_passes_is_what_the_operators_let_pass(how: str, admits: str) -> None:
    before = between(how)
    if not admits:
        plan = spinpass.plan(before, RotationConfig(rotations="gates"))
        assert not plan.spaces and all("matrices" not in r.why for r in plan.refusals), str(plan)
        return
    found = spinpass.rotate(before, given(torch.randperm(24, generator=torch.Generator().manual_seed(2))))
    assert found.certificate is not None and found.certificate.ok
    assert [s.group for s in found.plan.spaces] == [admits]
    if admits == "diagonal":
        assert spinpass.rotate(before, given(SCALES[:24])).certificate.ok  # type: ignore[union-attr]
    else:
        with pytest.raises(ConfigError, match="does not pass channels that are computed one by one; give an order"):
            spinpass.rotate(before, given(SCALES[:24]))


def test_refusals() -> None:
    before = program("llama")
    with pytest.raises(ConfigError, match=r"8 numbers are given, the space has size 80; give another one in `matrices`"):
        spinpass.transform(before, given(SCALES[:8]))
    with pytest.raises(ConfigError, match="does not pass channels that are computed one by one; give a scale for each"):
        spinpass.transform(before, given(torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64)).Q))
    with pytest.raises(ConfigError, match="diagonal.80. can be folded and not run, and here .* needs it online"):
        spinpass.transform(before, RotationConfig(matrices={"R4": SCALES}))
    half = program("llama", dtype=torch.float16)
    for scale in (1e5, 1e-6):  # its inverse is as far away
        with pytest.raises(ConfigError, match=r"has values up to 1\.0e\+0[56], and torch.float16 ends at 6\.6e\+04"):
            spinpass.transform(half, given(torch.full((models.FFN,), scale)))
    for wrong, why in ((torch.tensor([0, 0, 1]), "each of 0 … 2 once"), (torch.zeros(0, dtype=torch.int64), "once"),
                       (torch.ones(3).bool(), "an order of channels is an int64 tensor")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            Rotation.from_permutation(wrong)
    with pytest.raises(ConfigError, match="scale 2 has no inverse"):
        Rotation.from_blocks(torch.tensor([1.0, 0.0]))


# -- broken on purpose -------------------------------------------------------------------------------------------------


def not_inverted(m: pytest.MonkeyPatch) -> None:
    real = fold.rotate_constant
    m.setattr(fold, "rotate_constant", lambda editor, node, layout, rotation, *, dual: real(editor, node, layout, rotation))


def everything_is_linear(m: pytest.MonkeyPatch) -> None:
    m.setattr(gates, "_is_linear_in", lambda result, operands, inside: True)


def one_side_of_an_order(m: pytest.MonkeyPatch) -> None:
    real = gates._together
    m.setattr(gates, "_together", lambda result, spaces: real(result, spaces[-2:]))


@pytest.mark.parametrize(
    ("broken", "matrix", "name"),
    [(not_inverted, SCALES, "llama"), (everything_is_linear, SCALES, "gpt_neox"), (one_side_of_an_order, ORDER, "llama")],
)
def test_the_certificate_sees_broken_algebra(
    broken: Callable[[pytest.MonkeyPatch], None], matrix: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(VerificationError):
        spinpass.rotate(program(name), given(matrix))
