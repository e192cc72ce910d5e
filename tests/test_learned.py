"""``learn``: what the program that learns computes is what rotating and rounding by its matrices does, in every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spinpass
from spinpass import RotationConfig
from spinpass.errors import ConfigError, LearningError
from spinpass.execution import execute, flat_inputs, run
from spinpass.learned import basis_of, factored, learn
from spinpass.learning import Learning, Lesson, checkpoint, values
from spinpass.quantization import Basis, QuantizationConfig, Weights, pack, quantize
from spinpass.quantization.learned.bases import _Student
from spinpass.quantization.learned.transforms import FoldedConstant
from tests.support import models
from tests.support.decoders import relative_error
from tests.support.programs import program as decoder
from tests.support.quantizable import inputs, outlying

ONLINE = RotationConfig(form="online")
PLAIN = QuantizationConfig(weights=Weights(8, method="rtn", clip=False))


def bases(plan: spinpass.RotationPlan) -> list[Basis]:
    return [basis_of(space) for space in plan.spaces]


def begun(program: Any, config: RotationConfig) -> spinpass.Rotated:
    plan = spinpass.plan(program, config)
    made = {s.name: each for s in plan.spaces for each in (factored(s),) if each is not None}
    return spinpass.rotate(program, RotationConfig(form=config.form, matrices=made, verify=False))


@pytest.mark.parametrize("form", ["online", "offline"])
@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3", "gpt2", "phi3", "olmo2"])
def test_the_student_computes_what_its_matrices_make_of_the_program(name: str, form: Any) -> None:
    program = decoder(name, dtype=torch.float32)
    rotated = begun(program, RotationConfig(form=form))
    student = _Student(rotated.program, bases(rotated.plan), PLAIN)
    torch.manual_seed(0)
    with torch.no_grad():
        for transform in student.transforms.values():
            transform.moves["transforms"].normal_(0, 0.03)
        found = {**values(student.parts)}
    matrices = {space: transform.learned() for space, transform in student.transforms.items()}
    assert not all(rotation.is_orthogonal for rotation in matrices.values())
    config = RotationConfig(form=form, matrices=matrices)
    after = quantize(spinpass.transform(program, config), PLAIN).program
    given = flat_inputs(program, program.example_inputs)
    wanted, got = run(after, given), list(execute(student.program, {**given, **found}).outputs)
    assert relative_error(wanted, got) < 5e-3, "but for scales, which are stored in two bytes"
    for part in student.parts:
        if isinstance(part, FoldedConstant):
            object.__setattr__(part, "scheme", None)
    exact = list(execute(student.program, {**given, **values(student.parts)}).outputs)
    assert relative_error(run(program, given), exact) < 1e-4, "before anything is rounded it is the original"


def test_gradients_reach_every_matrix() -> None:
    program = decoder("llama", dtype=torch.float32)
    rotated = begun(program, ONLINE)
    student = _Student(rotated.program, bases(rotated.plan), QuantizationConfig.parse("w4-rtn-a4-kv4"))
    lesson = Lesson(student.program, program, [program.example_inputs], [program.example_inputs])
    torch.autograd.backward(lesson.loss(program.example_inputs, values(student.parts)))
    for space, transform in student.transforms.items():
        grad = transform.moves["transforms"].grad
        assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0, space


@pytest.mark.parametrize("name", models.DECODERS)
def test_learned_matrices_are_exact_before_anything_is_rounded(name: str) -> None:
    program = decoder(name)
    rotated = begun(program, ONLINE)
    student = _Student(rotated.program, bases(rotated.plan), PLAIN)
    torch.manual_seed(0)
    with torch.no_grad():
        for transform in student.transforms.values():
            transform.moves["transforms"].normal_(0, 0.03)
    matrices = {space: transform.learned() for space, transform in student.transforms.items()}
    found = spinpass.rotate(program, RotationConfig(form="online", matrices=matrices))
    assert found.certificate is not None and found.certificate.ok


@pytest.mark.parametrize("phases", [("local",), ("full",)], ids=str)
def test_a_program_learns_its_bases_and_its_numbers(phases: Any, tmp_path: Path) -> None:
    settings = Learning(("transforms", "scales", "offsets"), phases, rounds=4, rate=5)
    found = learn(outlying(), "w4-asym-a4-kv4", inputs(4), training=inputs(40)[8:], config=ONLINE, settings=settings)
    assert found.bases is not None and found.numbers is not None
    assert {*found.bases.kinds, *found.bases.dropped} == {"transforms"}
    assert {*found.numbers.kinds, *found.numbers.dropped} == {"scales", "offsets"}
    if found.bases.kept:
        assert found.bases.after < found.bases.before and found.config.matrices
    assert [s.rotation for s in found.plan.spaces if s.name in found.config.matrices] == [
        found.config.matrices[s.name] for s in found.plan.spaces if s.name in found.config.matrices
    ]
    spinpass.verify(outlying(), found.program)
    assert pack(found.quantized).program is not None


def test_a_run_that_was_stopped_goes_on_to_the_same_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAVED_EVERY", 0.0)
    options: dict[str, Any] = {"config": ONLINE, "settings": Learning(("transforms",), ("local",), rounds=2, rate=5)}
    options["training"] = inputs(20)
    whole = learn(outlying(), "w4-rtn-a4", inputs(2), **options)
    again = [learn(outlying(), "w4-rtn-a4", inputs(2), checkpoint=tmp_path, **options) for _ in range(2)]
    for each in again:
        assert each.config.matrices == whole.config.matrices and each.bases == whole.bases


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="learning needs calibration inputs"):
        learn(outlying(), "w4-rtn", [])
    with pytest.raises(ConfigError, match="'matrix' is nothing that can be learned"):
        learn(outlying(), "w4-rtn", inputs(2), settings=Learning(("matrix",)))
    with pytest.raises(ConfigError, match="learn bases with ranges per token"):
        learn(outlying(), "w8-rtn-a8static", inputs(2), settings=Learning(("transforms",)))
    with pytest.raises(ConfigError, match="transforms are learned before anything is rounded"):
        quantize(outlying(), QuantizationConfig(learn=Learning(("transforms",))), inputs(2))
    assert issubclass(LearningError, spinpass.SpinpassError)
