"""Spaces that admit it take any invertible matrix, in Kronecker factors, and the function stays what it was."""

from __future__ import annotations

import base64
import importlib
import json
import math
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig, record
from spinpass.certificate.programs import run, synthetic_inputs
from spinpass.errors import ConfigError, InvariantError, VerificationError
from spinpass.execution import into_basis
from spinpass.exporters.onnx import export
from spinpass.passes import lower
from spinpass.rotations import hadamard
from tests.support import models
from tests.support.decoders import relative_error
from tests.support.programs import program

EXACT = 1e-9


def factors(size: int, seed: int, spread: float = 0.3) -> list[Tensor]:
    """Random invertible factors of the sizes of a Hadamard matrix's."""
    generator = torch.Generator().manual_seed(seed)
    order = hadamard.largest_order(size)
    sizes = hadamard.kronecker_factors(order) if order == size else (size,)
    made = []
    for f in sizes:
        q, _ = torch.linalg.qr(torch.randn(f, f, generator=generator, dtype=torch.float64))
        made.append(q * (spread * torch.randn(f, generator=generator, dtype=torch.float64)).exp())
    return made


def matrices(plan: spinpass.RotationPlan) -> dict[str, Rotation]:
    spaces = [space for space in plan.spaces if space.group == "invertible"]
    return {s.name: Rotation.from_factors(factors(s.size, seed), s.name) for seed, s in enumerate(spaces)}


def scales(plan: spinpass.RotationPlan) -> dict[str, Rotation]:
    """Scales of both signs in front of the Hadamards, of queries and keys as well."""
    found = {}
    for seed, space in enumerate(s for s in plan.spaces if s.group == "invertible"):
        drawn = torch.randn(space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found[space.name] = Rotation.from_scales((0.4 * drawn).exp().clamp(0.4, 3) * drawn.sign(), space.name)
    return found


def config(**settings: Any) -> RotationConfig:
    return RotationConfig(**{"form": "online", "verify": False, **settings})


@pytest.mark.parametrize("given", [matrices, scales])
@pytest.mark.parametrize("name", models.DECODERS)
def test_every_decoder_keeps_its_function(name: str, given: Any) -> None:
    before = program(name)
    asked = given(spinpass.plan(before, config()))
    assert any(key.startswith("R1") for key in asked) and any(key.startswith("R3") for key in asked)
    found = spinpass.rotate(before, config(matrices=asked, verify=None))
    inputs = synthetic_inputs(before, seed=3)
    assert relative_error(run(before, inputs, float64=True), run(found.program, inputs, float64=True)) < EXACT
    for space in found.plan.spaces:
        if space.name in asked:
            assert space.rotation == asked[space.name] and not space.rotation.is_orthogonal
    assert found.certificate is not None and found.certificate.ok


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_caches_travel_in_the_new_basis_and_back(name: str) -> None:
    before = program(name, "cache")
    asked = {key: each for key, each in matrices(spinpass.plan(before, config())).items() if key.startswith("R2")}
    found = spinpass.rotate(before, config(rotations="R2", form="auto", matrices=asked))
    told = record.read(found.program)
    assert asked and told is not None and told.inputs
    assert set(told.rotations.values()) == {each.fingerprint() for each in asked.values()}
    again = record.Record.from_dict(json.loads(json.dumps(told.to_dict())))
    carried = next(iter(again.inputs.values()))
    x = torch.randn(2, 2, 5, carried.rotation.size, dtype=torch.float64)
    there = into_basis(x, carried)
    assert not torch.allclose(there, x) and torch.allclose(carried.rotation.apply(there, inverse=True), x)


def test_the_plan_says_which_matrices_a_space_admits_and_why() -> None:
    before = program("llama")
    offline, online = (spinpass.plan(before, config(form=form)) for form in ("offline", "online"))
    groups = {space.name.split(":")[0]: space.group for space in offline.spaces}
    assert groups == {"R1": "orthogonal", "R2": "invertible", "R3": "invertible", "R4": "invertible"}
    assert {s.group for s in online.spaces if s.role == "R1"} == {"invertible"}
    assert "R1 offline admits orthogonal matrices: a norm measures it" in str(offline)
    assert "R3 online admits invertible matrices: queries take the inverse transposed of what keys take" in str(offline)
    assert "orthogonal" not in {space.group for space in online.spaces}
    assert {each["group"] for each in offline.to_dict()["spaces"]} == {"orthogonal", "invertible"}


def test_where_only_orthogonal_ones_change_nothing_others_are_refused() -> None:
    key, size = "R1", models.HIDDEN
    bad = Rotation.from_factors(factors(size, 0))
    with pytest.raises(ConfigError, match="not orthogonal, and here only orthogonal ones change nothing: .*exclude"):
        spinpass.transform(program("llama"), config(form="offline", matrices={key: bad}))
    orthogonal = Rotation.from_factors(factors(size, 0, spread=0.0))
    assert orthogonal.is_orthogonal and orthogonal.condition == 1.0
    spinpass.transform(program("llama"), config(form="offline", matrices={key: orthogonal}, verify=None))


def test_a_matrix_that_would_let_rounding_grow_is_refused() -> None:
    singular = torch.diag(torch.logspace(0, -5, models.FFN, dtype=torch.float64))
    with pytest.raises(ConfigError, match="condition number of 1.0e\\+05, by which rounding of torch.float32 grows"):
        spinpass.transform(program("llama", dtype=torch.float32), config(matrices={"R4": singular}))
    for wrong in (torch.zeros(4, 4), torch.full((2, 2), float("nan")), torch.ones(2, 3), torch.eye(2).half(), "x"):
        with pytest.raises(ConfigError, match="factor 1"):
            Rotation.from_factors([wrong])  # type: ignore[list-item]
    for empty in ([], torch.eye(4).view(1, 4, 4)):
        with pytest.raises(ConfigError, match="at least one"):
            Rotation.from_factors(empty)  # type: ignore[arg-type]
    for odd in (torch.eye(4, device="meta"), torch.eye(4).to_sparse()):
        with pytest.raises(ConfigError, match="a plain tensor"):
            Rotation.from_factors([odd])
    with pytest.raises(ConfigError, match="is not an integer"):
        Rotation.from_factors([torch.eye(4)], size=8.0)  # type: ignore[arg-type]


def test_a_square_matrix_is_taken_as_it_is() -> None:
    dense = factors(models.FFN, 1)[0] if len(factors(models.FFN, 1)) == 1 else torch.kron(*factors(models.FFN, 1))
    spinpass.transform(program("llama"), config(matrices={"R4": dense}, verify=None))


def encoded(matrix: Tensor) -> str:
    return base64.b64encode(matrix.contiguous().numpy().tobytes()).decode()


@pytest.mark.parametrize("of", [(6,), (2, 3), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_what_a_product_of_factors_computes(of: tuple[int, ...], blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(f, f, generator=generator, dtype=torch.float64) + 2 * torch.eye(f) for f in of]
    whole = given[0]
    for each in given[1:]:
        whole = torch.kron(whole, each)
    order = len(whole)
    rotation = Rotation.from_factors(given, size=blocks * order)
    dense = torch.block_diag(*[whole] * blocks)
    x = torch.randn(3, blocks * order, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(dense)
    for options, matrix in (({}, dense), ({"inverse": True}, inverse), ({"dual": True}, inverse.T), ({"inverse": True, "dual": True}, dense.T)):
        torch.testing.assert_close(rotation.apply(x, **options), x @ matrix)
        torch.testing.assert_close(rotation.apply(x.T.contiguous(), 0, **options), (x @ matrix).T)
    assert rotation.flops == 2 * blocks * order * sum(of)
    again = Rotation.from_dict(json.loads(json.dumps(rotation.to_dict())))
    assert again == rotation and again.fingerprint() == rotation.fingerprint() and str(again) == str(rotation)
    assert Rotation.from_factors([2 * given[0], *given[1:]], size=blocks * order) != rotation
    told = rotation.to_dict()
    for damage in ({"size": math.inf}, {"factors": [encoded(math.nan * given[0])]}, {"kind": "learned", "factors": [], "matrix": encoded(2 * whole)}):
        with pytest.raises(ConfigError):
            Rotation.from_dict(told | {"size": order, "order": order} | damage)
    with pytest.raises(ConfigError, match="factor of a rotation is no square"):
        Rotation.from_dict(rotation.to_dict() | {"factors": ["AAAA"]})


@pytest.mark.parametrize("given", [matrices, scales])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runtimes_without_operators_of_spinpass_get_products(dtype: torch.dtype, given: Any) -> None:
    before: ExportedProgram = program("llama", dtype=dtype)
    asked = given(spinpass.plan(before, config()))
    after = lower(spinpass.transform(before, config(matrices=asked, verify=None)))
    assert not [node for node in after.graph.nodes if str(node.target).startswith("spinpass.")]
    inputs = synthetic_inputs(before, seed=3)
    error = relative_error(run(before, inputs), run(after, inputs))
    assert error < (1e-4 if dtype == torch.float32 else 0.2)


def test_onnx_runtime_computes_what_the_program_does(tmp_path: Path) -> None:
    """In as many products as the Hadamards of the same sizes are."""
    before: ExportedProgram = program("llama", "cache", dtype=torch.float32)
    asked = matrices(spinpass.plan(before, config()))
    products = []
    for place, given in enumerate((asked, scales(spinpass.plan(before, config())), {})):
        after = spinpass.transform(before, config(matrices=given, verify=None))
        report = export(after, tmp_path / f"{place}.onnx", fuse=False)
        assert report.certificate is not None and report.certificate.ok
        model = onnx.inliner.inline_local_functions(onnx.load(report.path))
        products.append(sum(node.op_type == "MatMul" for node in model.graph.node))
    assert products[0] == products[1] == products[2]


def test_scales_behind_a_norm_are_the_norms_own_in_onnx(tmp_path: Path) -> None:
    """So they take no time: a norm is multiplied by a vector in any case."""
    before: ExportedProgram = program("llama", "cache", dtype=torch.float32)
    asked = {n: each for n, each in scales(spinpass.plan(before, config())).items() if n.startswith("R1")}
    counts = []
    for given in (asked, {}):
        after = spinpass.transform(before, config(matrices=given, verify=None))
        report = export(after, tmp_path / f"{len(given)}.onnx", fuse=True)
        assert report.certificate is not None and report.certificate.ok
        model = onnx.load(report.path)
        counts.append(sum(node.op_type == "Mul" for node in model.graph.node))
    assert asked and counts[0] == counts[1]


class Hidden(nn.Module):
    """A gated layer between a table and a head; what makes a constant be used in two ways, or computed with, is chosen."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.e, self.g, self.u = how, nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(16, 32)
        self.d, self.h, self.c = nn.Linear(32, 16), nn.Linear(16, 40, bias=False), nn.Parameter(torch.randn(32, 16))
        self.q, self.p = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        if self.how == "delta":
            gate = nn.functional.linear(x, self.g.weight + self.c)
        elif self.how == "product":
            gate = nn.functional.linear(x, self.g.weight @ self.p)
        else:
            gate = self.g(x)
        x = x + self.d(nn.functional.silu(gate) * self.u(x))
        if self.how == "tied":
            return x @ self.e.weight.t()
        if self.how == "codebook":
            x = x + torch.softmax(x @ self.c.t(), -1) @ self.c
        if self.how == "vector":
            x = x + self.q
            return self.h(x) * torch.sigmoid(x @ self.q)[..., None]  # type: ignore[no-any-return]
        return self.h(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["offline", "online"])
@pytest.mark.parametrize("how", ["plain", "delta", "product", "tied", "codebook", "vector"])
def test_a_space_admits_only_what_keeps_the_function(how: str, form: Any) -> None:
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    before = torch.export.export(Hidden(how).double().eval(), (ids,))
    plan = spinpass.plan(before, config(form=form))
    asked = matrices(plan)
    spinpass.transform(before, config(form=form, matrices=asked, verify=None))
    if how == "plain" and form == "offline":
        assert any(key.startswith("R1:residual") for key in asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_in_two_bytes_takes_less(dtype: torch.dtype) -> None:
    spread = torch.diag(torch.logspace(0, -2, models.FFN, dtype=torch.float64))
    with pytest.raises(ConfigError, match=f"condition number of 1.0e\\+02, by which rounding of {dtype} grows"):
        spinpass.transform(program("llama", dtype=dtype), config(matrices={"R4": spread}))


@pytest.mark.parametrize("broken", ["the same scales on both sides", "no scales"])
def test_scales_on_the_wrong_side_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pass itself, which counts them, and where it does not count by the certificate."""
    before = program("llama")
    asked = {n: each for n, each in scales(spinpass.plan(before, config())).items() if n.startswith("R3")}
    real = Rotation.diagonal
    wrong = {"the same scales on both sides": lambda self, *, dual=False: real(self), "no scales": lambda self, *, dual=False: None}
    with monkeypatch.context() as patched:
        patched.setattr(Rotation, "diagonal", wrong[broken])
        with pytest.raises((InvariantError, VerificationError)):
            spinpass.rotate(before, config(matrices=asked, verify=None))
    inserting = importlib.import_module("spinpass.passes.insert_rotations")
    insert = inserting.rotate_value
    with monkeypatch.context() as patched:
        patched.setattr(inserting, "rotate_value", lambda *a, dual=False, **k: insert(*a, **k))
        with pytest.raises(InvariantError, match="values were scaled by the inverse"):
            spinpass.rotate(before, config(matrices=asked, verify=None))
