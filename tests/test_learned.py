"""``learn``: what the program that learns computes is what rotating and rounding by its matrices does, in every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spinpass
from spinpass import RotationConfig
from spinpass.certificate.programs import synthetic_inputs
from spinpass.errors import ConfigError, ExportError, LearningError
from spinpass.execution import execute, flat_inputs, run
from spinpass.graph import with_other_values
from spinpass.learned import basis_of, factored, learn, with_learned_bases
from spinpass.learning import Learning, Lesson, checkpoint, forget, values
from spinpass.learning.descent import Descent
from spinpass.quantization import Basis, QuantizationConfig, Weights, pack, quantize
from spinpass.quantization.learned.bases import _Student
from spinpass.quantization.learned.transforms import FoldedConstant, LearnedFactor
from tests.support.decoders import relative_error
from tests.support.programs import program as decoder
from tests.support.quantizable import inputs, outlying
from tests.support.quantizable import program as plain

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


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2", "phi3", "gemma2", "falcon", "gpt_neox"])
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


def test_another_scheme_model_or_text_does_not_go_on_from_what_one_has_saved(tmp_path: Path) -> None:
    settings = Learning(("transforms",), rounds=2, rate=5)

    def said(scheme: str, program: Any, text: Any, folder: Path | None) -> Any:
        return learn(program, scheme, inputs(2), training=text, config=ONLINE, settings=settings, checkpoint=folder).bases

    flipped = [(ids.flip(1),) for (ids,) in inputs(6)]
    cases = [("w4-rtn-a4", outlying(), inputs(6)), ("w4-rtn-a8", outlying(), inputs(6)),
             ("w4-rtn-a4", plain(), inputs(6)), ("w4-rtn-a4", outlying(), flipped)]  # fmt: skip
    found = [said(*case, tmp_path / "deep" / "er") for case in cases]
    assert found == [said(*case, None) for case in cases]


def test_float64_programs_and_schemes_without_weights_learn_bases() -> None:
    program = decoder("llama")
    shown = [synthetic_inputs(program, seed=seed) for seed in range(4)]
    found = learn(program, "a4", shown, config=ONLINE, settings=Learning(("transforms", "scales"), ("local",), rate=5))
    assert found.bases is not None and found.numbers is None
    found = learn(outlying(), "a4-kv4", inputs(4), config=ONLINE, settings=Learning(("clips",), rate=20))
    assert found.bases is None and found.numbers is not None and {*found.numbers.kinds, *found.numbers.dropped} == {"clips"}


def test_a_checkpoint_that_cannot_be_written_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"config": ONLINE, "settings": Learning(("transforms",)), "training": inputs(3)}
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "bases.pt").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "taken", str(tmp_path / "file" / "deep")):
        with pytest.raises(ExportError, match=r"learning cannot be saved at .*bases.pt: .*run it again"):
            learn(outlying(), "w4-rtn-a4", inputs(2), checkpoint=place, **options)

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExportError, match="file write failed; free the disk"):
        learn(outlying(), "w4-rtn-a4", inputs(2), checkpoint=tmp_path / "here", **options)
    assert not list((tmp_path / "here").iterdir()), "nothing is left half written"


def test_matrices_that_are_too_large_to_learn_stay_beside_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    program = decoder("llama", dtype=torch.float32)
    size = next(s.size for s in spinpass.plan(program, RotationConfig(form="offline")).spaces if s.role == "R1")
    monkeypatch.setattr("spinpass.learned.factored", lambda space: None if space.role == "R1" else factored(space))
    mine = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    config = RotationConfig(("R1", "R4"), form="offline", matrices={"R1": (mine,)})
    shown = [synthetic_inputs(program, seed=seed) for seed in range(2)]
    scheme = QuantizationConfig.parse("w4-rtn-a4")
    found, _ = with_learned_bases(program, config, scheme, shown, Learning(("transforms",)), held_out=shown)
    kept = [each for name, each in found.matrices.items() if name.startswith("R1:")]
    assert kept == [spinpass.Rotation.from_matrix(mine)], "a file of named matrices holds them, too"
    alone = RotationConfig("R1", form="offline", matrices={"R1": (mine,)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"none of the rotations can be learned: R1:.* \(learned\(\d+\)\) has no factors"):
        with_learned_bases(program, alone, scheme, shown, Learning(("transforms",)), held_out=shown)


def test_what_a_run_has_saved_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    names = ["b*.learning.pt", "b*.learning.best", "bases.learning.pt", "b*.learning.md"]
    for name in names:
        (tmp_path / name).write_text("")
    forget(tmp_path / "b*.learning.pt")
    forget(tmp_path / "b*.learning.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[2:])


def test_windows_held_out_whose_predictions_are_no_numbers_judge_nothing() -> None:
    one, shown = plain(), [(torch.full((2, 5), 3),)] * 3
    name = next(name for name, t in one.state_dict.items() if t.ndim == 2)  # the table
    changed = one.state_dict[name].detach().clone()
    changed[7] = torch.nan
    asked = Learning(("scales",))
    with pytest.raises(LearningError, match="windows held out is no number before anything is learned"):
        learn(with_other_values(one, {name: changed}), "w4-rtn", shown, held_out=[(torch.full((2, 5), 7),)], settings=asked)


def test_a_model_that_differs_in_its_last_row_alone_is_another_one() -> None:
    one, windows = plain(), inputs(2)
    name = next(name for name, t in one.state_dict.items() if t.ndim == 2)
    changed = one.state_dict[name].detach().clone()
    changed[-1, -1] += 1
    other = with_other_values(one, {name: changed})
    assert Lesson(one, one, windows, windows).described == Lesson(plain(), one, windows, windows).described
    assert Lesson(one, one, windows, windows).described != Lesson(other, one, windows, windows).described


class Pair(nn.Module):
    """Two layers whose names differ in a dot and an underscore."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.n, self.h = nn.Embedding(96, 16), nn.RMSNorm(16), nn.Linear(16, 96, bias=False)
        self.a, self.a_b = nn.Module(), self._layer()
        self.a.b = self._layer()

    def _layer(self) -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.e(ids)
        for layer in (self.a.b, self.a_b):
            x = x + layer["down"](nn.functional.silu(layer["up"](self.n(x))))  # type: ignore[index]
        return self.h(self.n(x))  # type: ignore[no-any-return]


def test_factors_of_names_that_look_alike_are_told_apart() -> None:
    ids = torch.randint(0, 96, (2, 7))
    program = torch.export.export(Pair().eval(), (ids,))
    rotated = begun(program, ONLINE)
    student = _Student(rotated.program, bases(rotated.plan), PLAIN)
    factors = [part.places for part in student.parts if isinstance(part, LearnedFactor)]
    assert len(factors) == len(set(factors)) > 2
    torch.manual_seed(0)
    with torch.no_grad():
        for transform in student.transforms.values():
            transform.moves["transforms"].normal_(0, 0.05)
    for part in student.parts:
        if isinstance(part, FoldedConstant):
            object.__setattr__(part, "scheme", None)
    exact = list(execute(student.program, {**flat_inputs(program, (ids,)), **values(student.parts)}).outputs)
    assert relative_error(run(program, (ids,)), exact) < 1e-4


def test_nothing_is_left_in_the_programs() -> None:
    program = plain()
    before = {name: tensor.detach().clone() for name, tensor in program.state_dict.items()}
    for phase in ("local", "full"):
        settings = Learning(("transforms", "scales", "gains"), (phase,), rate=5)  # type: ignore[arg-type]
        learn(program, "w4-rtn-a4", inputs(4), config=ONLINE, settings=settings)
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, before[name]) and tensor.grad is None


def test_minutes_are_counted_anew_in_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAVED_EVERY", 0.0)
    settings = Learning(("transforms",), rounds=8, minutes=1.0)
    real, taken = Descent.step, []

    def step(self: Descent, *given: Any) -> None:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        real(self, *given)

    options: dict[str, Any] = {"config": ONLINE, "settings": settings, "training": inputs(12), "checkpoint": tmp_path}
    with monkeypatch.context() as patched:
        patched.setattr(Descent, "step", step)
        with pytest.raises(KeyboardInterrupt):
            learn(outlying(), "w4-rtn-a4", inputs(2), **options)
    found = learn(outlying(), "w4-rtn-a4", inputs(2), **options).bases
    assert found is not None and found.steps > 20


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="two windows at least"):
        learn(outlying(), "w4-rtn-a4", inputs(1), config=ONLINE)
    with pytest.raises(ConfigError, match="no basis is better than another here"):
        learn(outlying(), "w4-gptq", inputs(4), config=ONLINE)
    for wrong in ({"batch": "2"}, {"rounds": 1.5}, {"seed": None}, {"kinds": "scales"}, {"minutes": "3"}, {"rate": None},
                  {"minutes": True}, {"rate": "fast"}, {"seed": 2**70}, {"seed": -(2**70)}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Learning(**wrong)  # type: ignore[arg-type]
    windows, plan = inputs(2), spinpass.plan(outlying(), ONLINE)
    for given, what in (({"settings": "scales"}, "settings is a str, not a spinpass.Learning"),
                        ({"config": plan}, "config is a RotationPlan, not a spinpass.RotationConfig"),
                        ({"training": 3}, "training is a int, not a sequence"), ({"held_out": windows[0][0]}, "held_out is a"),
                        ({"scheme": None}, "scheme=None is neither"), ({"calibration": "text"}, "calibration is a str")):  # fmt: skip
        asked: dict[str, Any] = {"scheme": "w4-rtn-a4", "calibration": windows, "config": ONLINE} | given
        with pytest.raises(ConfigError, match=what):
            learn(outlying(), **asked)
    with pytest.raises(ConfigError, match="learning needs calibration inputs"):
        learn(outlying(), "w4-rtn", [])
    with pytest.raises(ConfigError, match="'matrix' is nothing that can be learned"):
        learn(outlying(), "w4-rtn", inputs(2), settings=Learning(("matrix",)))
    with pytest.raises(ConfigError, match="learn bases with ranges per token"):
        learn(outlying(), "w8-rtn-a8static", inputs(2), settings=Learning(("transforms",)))
    with pytest.raises(ConfigError, match="transforms are learned before anything is rounded"):
        quantize(outlying(), QuantizationConfig(learn=Learning(("transforms",))), inputs(2))
    assert issubclass(LearningError, spinpass.SpinpassError)
