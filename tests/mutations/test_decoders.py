"""Programs that other tools corrupt silently: each exact, or left alone where it must be with the reason in the plan, and rotated
everywhere else."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

import spinpass
from spinpass import record
from tests.mutations.hazard import Hazard, param
from tests.mutations.oracle import check, reasons, steps
from tests.mutations.registry import ALL, functional, program
from tests.support import modules
from tests.support.decoders import FFN, HIDDEN, exported, made

FORMS: list[dict[str, Any]] = [
    dict(form="offline", tied="keep", kind="random-hadamard"),
    dict(form="online", kind="random-matrix"),
]
PRODUCT: list[dict[str, Any]] = [
    dict(form=form, tied=tied, kind=kind)
    for (form, tied), kind in product(
        [("auto", "keep"), ("auto", "untie"), ("offline", "keep"), ("offline", "untie"), ("online", "keep")],
        ["random-hadamard", "random-matrix"],
    )
] + [dict(form="offline", tied="untie"), {}]
DECOMPOSED = list(ALL)[::6]  # in the default run; all of them in the slow one


def allowed(name: str, form: str | None) -> set[str]:
    """Rotations that need not be found. R1 offline may be refused where an online part would have to gather channels."""
    return set(ALL[name].missing.split()) | ({"R1"} if form == "offline" else set())


def sweep(name: str, source: ExportedProgram, forms: list[dict[str, Any]], also: set[str] | None = None) -> None:
    """The original is run once; its program must be the same afterwards."""
    hazard, args = ALL[name], ALL[name].inputs()
    expected = steps(source, args)
    for settings in forms:
        check(
            source,
            expected,
            args,
            allowed(name, settings.get("form")) | (also or set()),
            bound=hazard.bound,
            **settings,
        )
    again = steps(source, args)
    assert all(torch.equal(x, y) for a, b in zip(expected, again) for x, y in zip(a, b) if isinstance(x, Tensor)), (
        "the input program was changed"
    )


def test_there_are_enough() -> None:
    assert len(ALL) >= 300 and all(c.__doc__ for c in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_a_hazard(name: str) -> None:
    """Exact in every form, in some cases decomposed as well; the plan folds what can fold, and names the barrier elsewhere."""
    hazard, source = ALL[name], program(name)
    pure = functional(source)  # what the pass itself would do first, each time
    if pure is not source:
        sweep(name, source, FORMS[:1])
    sweep(name, pure, FORMS)
    if name in DECOMPOSED:
        sweep(name, program(name, decomposed=True), FORMS[:1])
    if hazard.reason:
        plan = spinpass.plan(pure, spinpass.RotationConfig(form="offline", tied="keep"))
        assert re.search(hazard.reason, reasons(plan)), reasons(plan) or str(plan)
    if hazard.folds:
        plan = spinpass.plan(pure, spinpass.RotationConfig(rotations=("R1",), form="offline", tied="untie"))
        assert plan.spaces and not any(s.online for s in plan.spaces), str(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_hazard_in_the_product_of_forms(name: str) -> None:
    sweep(name, functional(program(name)), PRODUCT)
    sweep(name, program(name, decomposed=True), [f for f in PRODUCT if f["kind"] == "random-hadamard"], {"R1"})


# -- the cases of the issue, built by tests.support.modules --------------------------------------------------------------------


@cache
def listed(name: str) -> ExportedProgram:
    return modules.export(dtype=torch.float64, **modules.HAZARDS[name])


@pytest.mark.parametrize(
    ("form", "tied"), [("offline", "keep"), ("offline", "untie"), ("online", "keep"), ("auto", "auto")]
)
@pytest.mark.parametrize("name", modules.HAZARDS)
def test_the_listed_cases(name: str, form: str, tied: str) -> None:
    before = listed(name)
    after = spinpass.transform(
        before,
        spinpass.RotationConfig(form=form, tied=tied, kind="random-hadamard", verify=False),  # type: ignore[arg-type]
    )
    certificate = spinpass.verify(before, after)
    assert certificate.ok, str(certificate)
    found = record.read(after)
    assert found is not None
    assert {n.split(":")[0] for n in found.rotations} == {"R1", "R2", "R3", "R4"}


# -- the certificate agrees with the oracle where there is state, or a narrow type -------------------------------------


@pytest.mark.parametrize("cache_basis", ["rotated", "plain"])
@pytest.mark.parametrize("name", ["StaticCache", "WindowCache", "StaticCacheInPlace"])
def test_a_cache_passes_the_closed_loop(name: str, cache_basis: str) -> None:
    before = program(name)
    after = spinpass.transform(before, spinpass.RotationConfig(verify=False, kind="random-hadamard", cache=cache_basis))  # type: ignore[arg-type]
    certificate = spinpass.verify(before, after)
    assert certificate.ok and certificate.closed_loop_steps, str(certificate)
    found = record.read(after)
    assert found is not None
    assert bool(found.inputs) == (cache_basis == "rotated")


def test_a_cache_written_in_place_is_an_input_and_no_output() -> None:
    found = record.read(spinpass.transform(program("IndexCopyInPlace"), spinpass.RotationConfig(verify=True)))
    assert found is not None and not found.outputs and set(found.inputs) == {"keys", "values"}


@pytest.mark.parametrize("name", ["BufferCache2", "Shift"])
def test_state_in_buffers_stays_consistent_over_calls(name: str) -> None:
    """What the buffers hold at first is not zero."""
    before = program(name)
    for form in ("online", "offline"):
        after = spinpass.transform(before, spinpass.RotationConfig(verify=False, kind="random-hadamard", form=form))  # type: ignore[arg-type]
        certificate = spinpass.verify(before, after)
        assert certificate.ok and certificate.closed_loop_steps, str(certificate)


def test_weights_in_float32_are_exact_before_they_are_stored() -> None:
    spinpass.transform(program("LowerPrecision"), spinpass.RotationConfig(form="offline", verify=True))


class GroupedProducts(Hazard):
    """Tokens sorted by expert, one grouped product for all experts (torch has none in float64)."""

    def prepare(self) -> None:
        self.r, self.up, self.down = torch.nn.Linear(HIDDEN, 3), param(3, HIDDEN, FFN), param(3, HIDDEN, FFN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        ids = self.r(h).argmax(-1)
        order = ids.argsort(stable=True)
        ends = F.one_hot(ids, 3).sum(0).cumsum(0).to(torch.int32)
        y = F.silu(F.grouped_mm(h[order], self.up, offs=ends))
        y = F.grouped_mm(y, self.down.transpose(1, 2), offs=ends)
        return x + torch.zeros_like(y).index_copy(0, order, y).view_as(x)


def test_grouped_products_in_bfloat16() -> None:
    source = exported(made(GroupedProducts(), dtype=torch.bfloat16))
    for settings in FORMS:
        after = spinpass.transform(source, spinpass.RotationConfig(verify=False, **settings))
        with torch.no_grad():
            expected, actual = source.module()(*Hazard.inputs()), after.module()(*Hazard.inputs())
        wrong = float((expected.double() - actual.double()).abs().max() / expected.double().abs().max())
        assert wrong <= 16 * torch.finfo(torch.bfloat16).eps, f"{settings}: {wrong}"
