"""``learn``: what the program that learns computes is what rotating and rounding by its matrices does, in every model."""

from __future__ import annotations

import json
from dataclasses import replace
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
from spinpass.learned import learn, planned_bases, with_learned_bases
from spinpass.learning import Learning, LearningRecord, Lesson, checkpoint, forget, places_of, values
from spinpass.learning.descent import Descent
from spinpass.quantization import Basis, QuantizationConfig, Weights, begun_basis, pack, quantize, roles_of_bases
from spinpass.quantization.learned import bases as learned_bases_module
from spinpass.quantization.learned.bases import _Student
from spinpass.quantization.learned.folded import FoldedConstant
from spinpass.quantization.learned.transforms import TRANSFORMS as TRANSFORMS_KIND
from spinpass.quantization.learned.transforms import LearnedFactor, factored
from tests.support.decoders import HEAD, HEADS, Decoder, made, relative_error
from tests.support.programs import program as decoder
from tests.support.quantizable import export, inputs, outlying
from tests.support.quantizable import program as plain

ONLINE = RotationConfig(form="online")
PLAIN = QuantizationConfig(weights=Weights(8, method="rtn", clip=False))


TRANSFORMS = ("transforms",)
ALL = ("gates", "stacks", "transforms")


def begun(
    program: Any, config: RotationConfig, kinds: tuple[str, ...] = TRANSFORMS
) -> tuple[spinpass.Rotated, list[Basis]]:
    wider = replace(config, rotations=(*config.rotations, *roles_of_bases(kinds)), verify=False)
    plan = spinpass.plan(program, wider)
    made = {s.name: each for s in (*plan.spaces, *plan.offers) for each in (begun_basis(s, kinds),) if each is not None}
    rotated = spinpass.rotate(program, replace(wider, matrices={name: start for name, (_, start) in made.items()}))
    return rotated, planned_bases(rotated.plan, {name: kind for name, (kind, _) in made.items()})


def shaken(student: _Student, spread: float = 0.03) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for change in student.changes.values():
            for move in change.moves.values():
                move.normal_(0, spread)


CASES = [
    *((name, form, TRANSFORMS) for name in ("llama", "llama_bias", "qwen3", "gpt2", "phi3", "olmo2") for form in ("online", "offline")),
    *((name, "online", ALL) for name in ("llama_bias", "phi3", "gpt2")),
    ("llama", "online", ("gates",)), ("llama", "offline", ("stacks",)), ("phi3", "offline", ("gates", "transforms")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "kinds"), CASES, ids=str)
def test_the_student_computes_what_its_matrices_make_of_the_program(name: str, form: Any, kinds: Any) -> None:
    program = decoder(name, dtype=torch.float32)
    rotated, bases = begun(program, RotationConfig(form=form), kinds)
    student = _Student(rotated.program, bases, PLAIN)
    shaken(student)
    with torch.no_grad():
        found = {**values(student.parts)}
    matrices = {space: change.learned() for space, change in student.changes.items()}
    assert not all(rotation.is_orthogonal for rotation in matrices.values())
    config = replace(rotated.plan.config, matrices=matrices)
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
    rotated, bases = begun(program, ONLINE)
    student = _Student(rotated.program, bases, QuantizationConfig.parse("w4-rtn-a4-kv4"))
    lesson = Lesson(student.program, program, [program.example_inputs], [program.example_inputs])
    torch.autograd.backward(lesson.loss(program.example_inputs, values(student.parts)))
    for space, transform in student.changes.items():
        grad = transform.moves["transforms"].grad
        assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0, space


@pytest.mark.parametrize("kinds", [TRANSFORMS, ALL], ids=["transforms", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2", "phi3", "gemma2", "falcon", "gpt_neox"])
def test_learned_matrices_are_exact_before_anything_is_rounded(name: str, kinds: Any) -> None:
    program = decoder(name)
    rotated, bases = begun(program, ONLINE, kinds)
    student = _Student(rotated.program, bases, PLAIN)
    shaken(student)
    matrices = {space: change.learned() for space, change in student.changes.items()}
    free = {space for space, rotation in matrices.items() if not rotation.is_orthogonal}
    assert free and not any(space.startswith("R3") for space in free), "queries and keys learn rotations"
    found = spinpass.rotate(program, replace(rotated.plan.config, matrices=matrices, verify=True))
    assert found.certificate is not None and found.certificate.ok
    given = synthetic_inputs(program, seed=3)
    assert relative_error(run(program, given), run(found.program, given)) < 1e-9


@pytest.mark.parametrize("kinds", [ALL, ("gates", "stacks")], ids=str)
def test_what_is_learned_begins_where_nothing_is(kinds: Any) -> None:
    program = decoder("llama", dtype=torch.float32)
    rotated, bases = begun(program, ONLINE, kinds)
    student = _Student(rotated.program, bases, QuantizationConfig.parse("a4-kv4"))
    given = flat_inputs(program, program.example_inputs)
    for name, tensor in spinpass.transform(program, ONLINE).state_dict.items():
        torch.testing.assert_close(rotated.program.state_dict[name], tensor)
    with torch.no_grad():
        begins = list(execute(student.program, {**given, **values(student.parts)}).outputs)
        stored = {**rotated.program.state_dict}
        places = places_of(student.program)
        made_of = values([part for part in student.parts if isinstance(part, FoldedConstant)])
    assert all(torch.equal(made_of[places[name]], stored[name]) for name in stored if places[name] in made_of)
    assert relative_error(list(execute(student.program, given).outputs), begins) < 1e-5
    assert {basis.kind for basis in bases} == {*kinds, *(() if "transforms" in kinds else (None,))}
    assert sum(s.flops for s in rotated.plan.spaces if s.role in ("R2", "gates")) == 0
    assert rotated.plan.flops == spinpass.plan(program, ONLINE).flops


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
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
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
    kept_out = replace(TRANSFORMS_KIND, begin=lambda place: None if place.role == "R1" else factored(place))
    monkeypatch.setitem(learned_bases_module._KINDS, "transforms", kept_out)
    mine = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    config = RotationConfig(("R1", "R4"), form="offline", matrices={"R1": (mine,)})
    shown = [synthetic_inputs(program, seed=seed) for seed in range(2)]
    scheme = QuantizationConfig.parse("w4-rtn-a4")
    found, _ = with_learned_bases(program, config, scheme, shown, Learning(("transforms",)), held_out=shown)
    kept = [each for name, each in found.matrices.items() if name.startswith("R1:")]
    assert kept == [spinpass.Rotation.from_matrix(mine)], "a file of named matrices holds them, too"
    alone = RotationConfig("R1", form="offline", matrices={"R1": (mine,)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no basis of it can be learned: R1:.* \(learned\(\d+\)\) has no factors"):
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


def spread_out(what: str) -> Any:
    """A decoder with a channel of u, or half a value head, far above the others, which the next layer takes back."""
    model: Any = made(Decoder(layers=2, kv=HEADS), dtype=torch.float32)
    with torch.no_grad():
        for block in model.blocks:
            into, out = (block.mlp.up, block.mlp.down) if what == "gates" else (block.attn.v, block.attn.o)
            spread = torch.ones(into.out_features)
            spread[slice(3, 4) if what == "gates" else slice(0, HEAD // 2)] = 30.0
            into.weight *= spread[:, None]
            out.weight /= spread
    return export(model)


@pytest.mark.parametrize(("kind", "scheme", "rotation"), [("gates", "w4-rtn-a4", "R1"), ("stacks", "a8-kv4", "R2")])
def test_what_folds_learns_where_channels_or_heads_differ(kind: str, scheme: str, rotation: Any) -> None:
    program, shown = spread_out(kind), inputs(24)
    config = RotationConfig(rotations=(rotation,), verify=False)
    settings = Learning((kind,), rounds=4, rate=5)
    found = learn(program, scheme, inputs(2), config=config, settings=settings, training=shown, held_out=shown)
    assert found.bases is not None and found.bases.kinds == (kind,)
    assert found.bases.after < 0.8 * found.bases.before
    role = "gates" if kind == "gates" else "R2"
    spaces = [space for space in found.plan.spaces if space.role == role]
    assert spaces and all(space.rotation == found.config.matrices[space.name] and not space.flops for space in spaces)
    assert spinpass.verify(program, found.program).ok
    again = spinpass.RotationPlan.from_dict(json.loads(json.dumps(found.plan.to_dict())))
    assert again.spaces == found.plan.spaces
    alike = spinpass.transform(program, plan=again)
    assert all(torch.equal(tensor, alike.state_dict[name]) for name, tensor in found.program.state_dict.items())


def test_a_kind_that_was_dropped_leaves_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    record = LearningRecord(2.0, 1.0, 1, ("stacks",), ("gates",))
    monkeypatch.setattr(learned_bases_module, "taught", lambda *given, **options: record)
    program = decoder("llama", dtype=torch.float32)
    settings, scheme = Learning(("stacks", "gates")), QuantizationConfig.parse("a8-kv4")
    found, _ = with_learned_bases(program, ONLINE, scheme, [program.example_inputs] * 2, settings)
    assert found.matrices and {name.split(":")[0] for name in found.matrices} == {"R2"}
    assert found.rotations == ONLINE.rotations
    monkeypatch.setattr(learned_bases_module, "taught", lambda *given, **options: replace(record, after=3.0))
    found, _ = with_learned_bases(program, ONLINE, scheme, [program.example_inputs] * 2, settings)
    assert found == ONLINE


@pytest.mark.parametrize("kinds", [TRANSFORMS, ("stacks",)], ids=str)
def test_what_lies_on_top_of_a_learned_matrix_stays_there(kinds: Any) -> None:
    program = decoder("llama", dtype=torch.float32)
    rotated, bases = begun(program, RotationConfig(rotations=("R2", "heads")), kinds)
    student = _Student(rotated.program, bases, PLAIN)
    shaken(student, 0.1)
    for part in student.parts:
        if isinstance(part, FoldedConstant):
            object.__setattr__(part, "scheme", None)
    given = flat_inputs(program, program.example_inputs)
    exact = list(execute(student.program, {**given, **values(student.parts)}).outputs)
    assert relative_error(run(program, given), exact) < 1e-4


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
    rotated, bases = begun(program, ONLINE)
    student = _Student(rotated.program, bases, PLAIN)
    factors = [part.places for part in student.parts if isinstance(part, LearnedFactor)]
    assert len(factors) == len(set(factors)) > 2
    shaken(student, 0.05)
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
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
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
    with pytest.raises(ConfigError, match="gates and stacks are learned before anything is rounded"):
        quantize(outlying(), QuantizationConfig(learn=Learning(("scales", "gates", "stacks"))), inputs(2))
    with pytest.raises(ConfigError, match="has no heads that take a matrix each"):
        learn(outlying(), "a4-kv4", inputs(4), config=RotationConfig(rotations=("R1",)), settings=Learning(("stacks",)))
    assert issubclass(LearningError, spinpass.SpinpassError)
