"""Each key/value head takes an invertible matrix of its own, and queries the dual of their keys'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig, record
from spinpass.certificate.programs import run, synthetic_inputs
from spinpass.errors import ConfigError, VerificationError
from spinpass.execution import into_basis
from spinpass.exporters.onnx import export
from spinpass.formats import read_artefact, read_matrices, write_matrices
from spinpass.passes import fold
from spinpass.record import Carried
from spinpass.rotations import blocks
from tests.support.decoders import relative_error
from tests.support.programs import program

EXACT = 1e-9
HEADS = RotationConfig(rotations=("R2", "R3"))
PROGRAMS = [("llama", "plain"), ("llama", "cache"), ("phi3", "plain"), ("gpt2", "plain"), ("opt", "cache"),
            ("bloom", "plain"), ("gpt_neox", "static_decode")]  # fmt: skip


def invertible(heads: int, size: int, generator: torch.Generator) -> Tensor:
    turned = torch.linalg.qr(torch.randn(heads, size, size, generator=generator, dtype=torch.float64)).Q
    return turned * (0.4 * torch.randn(heads, 1, size, generator=generator, dtype=torch.float64)).exp()


def stacks(before: ExportedProgram, config: RotationConfig = HEADS) -> dict[str, Tensor]:
    """Random invertible matrices, one for each head, of the spaces of a program that take them."""
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: invertible(s.heads, s.size, generator)
        for s in spinpass.plan(before, config).spaces
        if s.heads > 1 and s.group == "invertible"
    }


def given(matrices: dict[str, Any], **settings: Any) -> RotationConfig:
    return RotationConfig(rotations=("R2", "R3"), matrices=matrices, **settings)


@pytest.mark.parametrize(("name", "how"), PROGRAMS, ids=lambda value: value)
def test_every_head_has_a_matrix_of_its_own(name: str, how: str) -> None:
    before = program(name, how)
    asked = stacks(before)
    assert any(key.startswith("R2") for key in asked)
    assert any(key.startswith("R3") for key in asked) == (name in ("gpt2", "opt", "bloom"))  # the others have RoPE
    found = spinpass.rotate(before, given(asked))
    assert found.certificate is not None and found.certificate.ok
    used = {space.name: space.rotation for space in found.plan.spaces if space.name in asked}
    assert all(used[key] == Rotation.from_blocks(each) and not used[key].is_orthogonal for key, each in asked.items())
    if how == "plain":
        inputs = synthetic_inputs(before, seed=3)
        assert relative_error(run(before, inputs, float64=True), run(found.program, inputs, float64=True)) < EXACT


def test_the_plan_says_how_many_matrices_a_space_takes() -> None:
    plan = spinpass.plan(program("gpt2"), HEADS)
    assert {(s.role, s.group, s.heads) for s in plan.spaces} == {("R2", "invertible", 4), ("R3", "invertible", 4)}
    assert "R2 offline admits invertible matrices, one for each of 4 heads: it is contracted with constants" in str(plan)
    assert "one for each of 4 heads: queries take the inverse transposed of what keys take" in str(plan)
    assert spinpass.RotationPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_caches_hold_every_head_in_its_basis_and_have_a_way_back() -> None:
    before = program("opt", "cache")
    after = spinpass.transform(before, given(stacks(before)))
    told = record.read(after)
    assert told is not None and told.inputs and {each.heads for each in told.inputs.values()} == {-3}
    again = record.Record.from_dict(json.loads(json.dumps(told.to_dict())))
    assert again == told
    keys, values = (next(e for e in told.inputs.values() if e.space.startswith(role)) for role in ("R3", "R2"))
    x = torch.randn(2, 4, 5, keys.rotation.order, dtype=torch.float64)
    there = into_basis(x, values)
    for head in range(4):
        block = values.rotation.matrix().unflatten(0, (4, -1)).unflatten(2, (4, -1))[head, :, head]
        torch.testing.assert_close(there[:, head], x[:, head] @ block)
    torch.testing.assert_close(values.applied(there, inverse=True), x)


def test_a_plan_with_matrices_for_heads_is_kept_and_carried_out_again(tmp_path: Path) -> None:
    before = program("llama")
    asked = given(stacks(before))
    plan = spinpass.plan(before, asked)
    spinpass.save_plan(plan, tmp_path / "plan.json")
    again = spinpass.load_plan(tmp_path / "plan.json")
    one, other = spinpass.transform(before, asked), spinpass.transform(before, again)
    assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    rotations = {key: Rotation.from_blocks(each, key) for key, each in asked.matrices.items()}  # type: ignore[arg-type]
    write_matrices(tmp_path / "bases.json", rotations, {})
    assert read_matrices(tmp_path / "bases.json") == rotations


def test_onnx_runtime_takes_a_cache_with_a_basis_for_each_head(tmp_path: Path) -> None:
    before = program("opt", "cache", dtype=torch.float32)
    after = spinpass.transform(before, given(stacks(before)))
    report = export(after, tmp_path / "model.onnx")
    assert report.certificate is not None and report.certificate.ok
    carried = read_artefact(report.path).bases
    assert carried and all(each.heads == -3 for each in carried.values())


def test_one_matrix_for_all_heads_is_the_same_matrix_for_each() -> None:
    before = program("gpt2")
    matrix = stacks(before)["R2:transformer.h.0.attn"][0]
    one, each = (spinpass.transform(before, given({"R2": m})) for m in (matrix, matrix.expand(4, -1, -1)))
    for name, tensor in one.state_dict.items():
        torch.testing.assert_close(each.state_dict[name], tensor)


class Attend(nn.Module):
    """One attention of four heads, whose values something is done to across heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.e, self.o, self.h = how, nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        value = self.v(x)
        if self.how == "normed across heads":
            value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-5)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (self.q(x), self.k(x), value))
        if self.how == "summed across heads":
            v = v + v.sum(1, keepdim=True)
        if self.how == "rolled across heads":
            v = v.roll(1, 1)
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.how == "gated by head":
            made = made * torch.sigmoid(made.new_ones(4, 1, 1) * 0.3)
        return self.h(x + self.o(made.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("plain", ""),
        ("gated by head", ""),
        ("normed across heads", "not orthogonal|head 1 cannot be told from the others"),
        ("summed across heads", "head 1 cannot be told from the others|heads share parts"),
        ("rolled across heads", "head 1 cannot be told from the others|no space of this program"),
    ],
)
def test_heads_that_are_mixed_share_one_matrix(how: str, why: str) -> None:
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    before = torch.export.export(Attend(how).double().eval(), (ids,))
    generator = torch.Generator().manual_seed(1)
    each = invertible(4, 8, generator)
    asked = RotationConfig(rotations="R2", matrices={"R2": each})  # type: ignore[arg-type]
    if not why:
        assert spinpass.rotate(before, asked).certificate.ok  # type: ignore[union-attr]
        return
    with pytest.raises(ConfigError, match=why):
        found = spinpass.rotate(before, asked)
        assert not found.plan.spaces, str(found.plan)
        raise ConfigError(f"no space of this program: {found.plan.refusals}")


class Narrow(nn.Module):
    """An attention of four heads of one channel each, whose views drop that axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.o, self.h = nn.Embedding(40, 8), nn.Linear(4, 8), nn.Linear(8, 40)
        self.q, self.k, self.v = (nn.Linear(8, 4) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (each(x).unflatten(-1, (4, 1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 1, -1, -1).flatten(1, 2) for t in (k, v))
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.h(x + self.o(made.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def test_heads_of_one_channel_are_left_alone() -> None:
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    before = torch.export.export(Narrow().double().eval(), (ids,))
    found = spinpass.rotate(before)
    assert found.certificate is not None and found.certificate.ok
    assert {s.role for s in found.plan.spaces} == {"R1"}
    assert any("one channel" in r.why for r in found.plan.refusals), str(found.plan)


def test_refusals() -> None:
    before = program("llama")
    size = 16
    ones = torch.eye(size, dtype=torch.float64)
    with pytest.raises(ConfigError, match="matrices for 3 heads, and 2 key/value heads: give one for each"):
        spinpass.transform(before, given({"R2": 2 * ones.expand(3, -1, -1)}))
    with pytest.raises(ConfigError, match="matrices of heads are of size 8, the space has size 16"):
        spinpass.transform(before, given({"R2": 2 * torch.eye(8).expand(2, -1, -1)}))
    with pytest.raises(ConfigError, match="for each of 2 heads, and here all have to share one: heads are those of"):
        spinpass.transform(before, given({"R3": 2 * ones.expand(2, -1, -1)}))
    merged = program("bloom", "cache")
    with pytest.raises(ConfigError, match="head 1 cannot be told from the others at .*: a view merges the axis with"):
        spinpass.transform(merged, given({"R2": 2 * torch.eye(12, dtype=torch.float64).expand(4, -1, -1)}))
    badly = ones.expand(2, -1, -1) * torch.logspace(0, -5, size, dtype=torch.float64)
    with pytest.raises(ConfigError, match="condition number of 1.0e\\+05, by which rounding of torch.float32"):
        spinpass.transform(program("llama", dtype=torch.float32), given({"R2": badly}))
    for wrong, why in (
        (torch.zeros(2, 4, 4), "the matrix of head 1 has no inverse"),
        (torch.ones(2, 3, 4), r"matrices for each head are \(heads, n, n\)"),
        (torch.eye(4).half().expand(2, -1, -1), "must be float32 or float64"),
        (torch.eye(4, device="meta").expand(2, -1, -1), "a plain tensor"),
    ):
        with pytest.raises(ConfigError, match=why):
            Rotation.from_blocks(wrong)
    with pytest.raises(ConfigError, match="no factors that a graph could multiply by"):
        Rotation.from_blocks(torch.eye(4).expand(2, -1, -1)).operands()


# -- broken on purpose -------------------------------------------------------------------------------------------------


def not_transposed(m: pytest.MonkeyPatch) -> None:
    """Readers take A⁻¹ in place of A⁻ᵀ."""
    real = blocks.multiply_blocks
    m.setattr(blocks, "multiply_blocks", lambda *a, dual, inverse, **k: real(*a, dual=False, inverse=inverse or dual, **k))


def other_heads(m: pytest.MonkeyPatch) -> None:
    """Readers take the matrix of the head beside."""
    real = blocks.multiply_blocks

    def multiply(x: Tensor, matrices: Tensor, dim: int, *, dual: bool, **options: Any) -> Tensor:
        return real(x, matrices.roll(1, 0) if dual else matrices, dim, dual=dual, **options)

    m.setattr(blocks, "multiply_blocks", multiply)


def not_dual(m: pytest.MonkeyPatch) -> None:
    """Queries take the basis of the keys."""
    real = fold.rotate_constant
    m.setattr(fold, "rotate_constant", lambda editor, node, layout, rotation, *, dual: real(editor, node, layout, rotation))


def cache_of_one_head(m: pytest.MonkeyPatch) -> None:
    """The way into the cache takes the heads in another order."""
    real = Carried.applied
    m.setattr(Carried, "applied", lambda self, x, *, inverse=False: real(self, x if inverse else x.roll(1, -3), inverse=inverse))


@pytest.mark.parametrize(
    ("broken", "name", "how"),
    [(not_transposed, "llama", "plain"), (not_transposed, "opt", "plain"), (other_heads, "llama", "cache"),
     (other_heads, "opt", "plain"), (not_dual, "gpt2", "plain"), (cache_of_one_head, "opt", "cache")],
)  # fmt: skip
def test_the_certificate_sees_broken_algebra(
    broken: Callable[[pytest.MonkeyPatch], None], name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = program(name, how)
    asked = given(stacks(before))
    with monkeypatch.context() as patched:
        broken(patched)
        with pytest.raises(VerificationError):
            spinpass.rotate(before, asked)
    assert spinpass.rotate(before, asked).certificate.ok  # type: ignore[union-attr]
