"""Values as documents: what is read back is what was written, and what is no such document is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.export import ExportedProgram

import spinpass
from spinpass import Certificate, ConfigError, Override, Rotation, RotationConfig, RotationPlan
from spinpass.analysis import Refusal
from spinpass.certificate import BOUNDS, FileCertificate, FileOutput
from spinpass.certificate.certificate import Difference, OutputCheck
from spinpass.errors import DamageError
from spinpass.folders import Card
from spinpass.formats import load_plan
from spinpass.learned import Learned
from spinpass.planning import OnlinePart, PlannedSpace
from tests.support.decoders import Decoder, exported, made

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXT = st.text(max_size=12)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
COUNT = st.integers(0, 2**40)
SHAPE = st.lists(st.integers(0, 99), max_size=3).map(tuple)
NUMBER = st.floats(allow_nan=False)
SHARE = st.none() | st.floats(0, 1)
ROLE = st.sampled_from(["R1", "R2", "R3", "R4", "latent", "heads"])


@st.composite
def rotations(draw: Any) -> Rotation:
    kind = draw(st.sampled_from(["hadamard", "random-hadamard", "random-matrix", "learned", "kronecker"]))
    if kind not in ("learned", "kronecker"):
        return Rotation.create(kind, draw(st.sampled_from([1, 4, 12, 576])), seed=draw(st.integers(0, 9)), identity=draw(TEXT))
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))), dtype=torch.float64)
    if kind == "kronecker":
        return Rotation.from_factors([matrix, matrix], draw(TEXT))
    return Rotation.from_matrix(torch.linalg.qr(matrix)[0], draw(TEXT))


SPACES = st.builds(
    PlannedSpace,
    name=TEXT, role=ROLE, size=COUNT, form=st.sampled_from(["offline", "online"]), rotation=rotations(), writers=TEXTS, readers=TEXTS,
    online=st.lists(st.builds(OnlinePart, TEXT, TEXT, COUNT, st.booleans()), max_size=2).map(tuple),
    cache=TEXTS, bytes_added=st.integers(-9, 9), notes=TEXTS, group=st.sampled_from(["orthogonal", "invertible"]), admits=TEXT,
)  # fmt: skip
CONFIGS = st.builds(
    RotationConfig,
    rotations=st.just("R1,R2,R3,R4"), form=st.sampled_from(["auto", "online"]), exclude=TEXTS,
    block_size=st.none() | st.integers(1, 64), verify=st.none() | st.booleans(),
    overrides=st.dictionaries(st.just("R2"), st.builds(Override, block_size=st.none() | st.integers(1, 9))),
    matrices=st.dictionaries(st.sampled_from(["R1", "R4:x"]), rotations())
    | st.dictionaries(st.just("R2"), st.lists(rotations(), min_size=1, max_size=3).map(tuple)),
)  # fmt: skip
PLANS = st.builds(
    RotationPlan, CONFIGS, st.lists(SPACES, max_size=3).map(tuple), st.lists(st.builds(Refusal, TEXT, TEXT, TEXTS), max_size=2).map(tuple),
    st.dictionaries(TEXT, SHAPE, max_size=3),
)  # fmt: skip
DIFFERENCES = st.builds(Difference, NUMBER, NUMBER, SHARE)
CERTIFICATES = st.builds(
    Certificate,
    st.lists(st.builds(OutputCheck, TEXT, SHAPE, DIFFERENCES, DIFFERENCES, NUMBER, NUMBER, NUMBER, st.just("") | TEXT, NUMBER, st.booleans()), max_size=3).map(tuple),
    st.sampled_from(list(BOUNDS)), st.booleans(), TEXT, TEXTS, COUNT, TEXT, COUNT, TEXTS,
)  # fmt: skip
OF_FILES = st.builds(
    FileCertificate,
    st.lists(st.builds(FileOutput, TEXT, SHAPE, DIFFERENCES, NUMBER, st.booleans(), NUMBER), max_size=3).map(tuple),
    st.sampled_from(list(BOUNDS)), TEXTS, TEXT, COUNT,
)  # fmt: skip
FINITE = st.floats(0, 1e9)
CARDS = st.builds(Card, TEXT, FINITE, st.none() | FINITE, FINITE, FINITE, COUNT, FINITE, st.none() | FINITE, st.none() | FINITE, COUNT, COUNT)
VALUES = PLANS | CERTIFICATES | OF_FILES | CARDS


@cache
def program_of(seed: int = 0, **shape: int) -> ExportedProgram:
    return exported(made(Decoder(**shape), seed=seed))


def through_json(data: object) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


@quick
@given(value=VALUES)
def test_what_is_read_is_what_was_written(value: Any) -> None:
    data = through_json(value.to_dict())
    assert data == value.to_dict()
    assert type(value).from_dict(data) == value


@quick
@given(value=VALUES)
def test_each_is_shown_in_one_line_and_as_escaped_html(value: Any) -> None:
    assert "\n" not in repr(value).replace(repr("\n")[1:-1], "") or any("\n" in text for text in texts_of(value.to_dict()))
    page = value._repr_html_()
    assert page.startswith("<div>") and page.endswith("</div>")
    assert page.count("<table>") == page.count("</table>") > 0


def texts_of(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    for inner in data.items() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from texts_of(list(inner) if isinstance(inner, tuple) else inner)


# -- documents that are damaged, foreign, or changed -------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotated() -> spinpass.Rotated:
    return spinpass.rotate(program_of(layers=2))


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from leaves(each, (*path, key))


def changed(data: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    data = copy.deepcopy(data)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return data


def put(value: object) -> Callable[[Any, Any], None]:
    def change(inside: Any, key: Any) -> None:
        inside[key] = value

    return change


def drop(inside: Any, key: Any) -> None:
    del inside[key]


CHANGES = [drop, *map(put, (None, -1, 1.5, 2**80, True, "x", "nan", [], {}, [[]], {"x": 1}))]


@pytest.mark.parametrize("kind", ["plan", "certificate", "file", "card"])
def test_a_document_changed_in_one_place_is_refused_or_says_what_it_holds(rotated: spinpass.Rotated, kind: str) -> None:
    """Whatever one place is changed to: no other error, and no value that says something else than the document."""
    value: Any = {
        "plan": replace(rotated.plan, spaces=rotated.plan.spaces[:2]),
        "certificate": rotated.certificate,
        "file": FileCertificate((FileOutput("logits", (2, 3), Difference(math.inf, 1.0, 0.5), 1e-3),), torch.float32, ("ids",), "file", 3),
        "card": Card("torch", 1.02, None, 0.01, 0.97, 91_200_000, 5.4, 70.0, None, 8, 512),
    }[kind]
    data, refused, tried = through_json(value.to_dict()), 0, 0
    for path in leaves(data):
        for change in CHANGES:
            other = changed(data, path, change)
            if other == data:
                continue
            tried += 1
            try:
                assert type(value).from_dict(other).to_dict() == other, (path, other)
            except ConfigError as error:
                assert str(error) and len(str(error)) < 500, error
                refused += 1
    assert refused > 0.8 * tried > 100


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "this is no plan of spinpass"),
        ({"spaces": []}, "does not begin with 'spinpass': 'plan'"),
        ({"spinpass": "matrices"}, "but says that it is 'matrices'"),
        ({"spinpass": "plan", "version": 2}, "is of version 2, and this one reads 1: update spinpass"),
        ({"spinpass": "plan", "version": "1"}, "is of version '1', and this one reads 1: write it anew"),
        ({"spinpass": "plan", "version": 1}, "plan has no 'rotations'"),
    ],
)
def test_what_is_no_plan_is_told_by_what_it_is(data: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RotationPlan.from_dict(data)


def test_the_place_of_what_is_wrong_is_named(rotated: spinpass.Rotated) -> None:
    data = through_json(rotated.plan.to_dict())
    for path, value, why in (
        (("spaces", 1, "size"), "48", "plan.spaces[1].size is '48', not a whole number from 0"),
        (("spaces", 1, "flops_per_token"), 5, "plan.spaces[1].flops_per_token is 5, and the rest of the document says 0"),
        (("spaces", 0, "fingerprint"), "abc", "the matrix of R1:residual (abc…) is not in the document"),
        (("colour",), "red", "plan.colour is 'red', and the rest of the document has no such field"),
    ):
        with pytest.raises(ConfigError) as caught:
            RotationPlan.from_dict(changed(data, path, put(value)))
        assert why in str(caught.value)


def test_a_certificate_that_says_more_than_its_numbers_is_refused(rotated: spinpass.Rotated) -> None:
    assert rotated.certificate is not None
    data = through_json(rotated.certificate.to_dict())
    data["outputs"][0]["float64"]["error"] = 1.0
    with pytest.raises(ConfigError, match="certificate.ok is True, and the rest of the document says False"):
        Certificate.from_dict(data)


# -- plans in files ----------------------------------------------------------------------------------------------------


def test_a_plan_with_matrices_comes_back_from_a_file(tmp_path: Path) -> None:
    program = program_of(layers=1)
    size = spinpass.plan(program, RotationConfig(rotations="R1")).spaces[0].size
    matrix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    plan = spinpass.plan(program, RotationConfig(matrices={"R1": matrix})).without("R4:blocks.0.mlp.down")
    spinpass.save_plan(plan, tmp_path / "new" / "plan.json")
    again = spinpass.load_plan(tmp_path / "new" / "plan.json")
    assert again.spaces == plan.spaces and again.refusals == plan.refusals and again.to_dict() == plan.to_dict()
    one, other = (spinpass.transform(program, each) for each in (plan, again))
    assert one.state_dict.keys() == other.state_dict.keys()
    assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    with pytest.raises(ConfigError, match="the plan was written without its matrices .one of size"):
        RotationPlan.from_dict(plan.to_dict(matrices=False))


def test_a_plan_of_another_program_is_refused_by_what_differs(rotated: spinpass.Rotated) -> None:
    smaller = program_of(layers=1)
    with pytest.raises(ConfigError, match=r"of another program: blocks\.1\.\S+ is missing here and is \["):
        spinpass.transform(smaller, rotated.plan)
    wider = program_of(layers=2, ffn=48)
    with pytest.raises(ConfigError, match=r"of another program: blocks\.0\.mlp\.\S+ is \[48, \d+\] here and is \["):
        spinpass.transform(wider, rotated.plan)
    same = program_of(7, layers=2)  # other weights of the same shapes
    assert spinpass.rotate(same, rotated.plan).plan.spaces == rotated.plan.spaces


def test_a_plan_whose_shapes_are_unknown_is_compared_space_by_space(rotated: spinpass.Rotated) -> None:
    unknown = replace(rotated.plan, parameters={})
    with pytest.raises(ConfigError, match="R4:blocks.0.mlp.down has size 48 here and"):
        spinpass.transform(program_of(layers=2, ffn=48), unknown)
    with pytest.raises(ConfigError, match="the plan has a space 'R2:blocks.1.attn' that this program has not"):
        spinpass.transform(program_of(layers=1), unknown)
    first, *rest = unknown.spaces
    other = replace(unknown, spaces=(replace(first, form="online"), *rest))
    with pytest.raises(ConfigError, match="R1:residual has form offline here and online in the plan"):
        spinpass.transform(program_of(layers=2), other)


def test_what_stands_in_place_of_a_plan_is_refused(rotated: spinpass.Rotated) -> None:
    program = program_of(layers=2)
    wrong: Any = rotated.plan.to_dict()
    with pytest.raises(ConfigError, match="plan is a dict, not a spinpass.RotationPlan"):
        spinpass.transform(program, plan=wrong)
    with pytest.raises(ConfigError, match="two plans are given"):
        spinpass.transform(program, rotated.plan, plan=rotated.plan)


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match="there is no file .*plan.json: name one that spinpass plan MODEL --save FILE"):
        load_plan(path)
    path.write_text('{"spinpass": "matrices"}')
    with pytest.raises(ConfigError, match="plan.json: this is no plan of spinpass, but says that it is 'matrices'"):
        load_plan(path)
    path.write_text('{"spinpass": "plan", ')
    with pytest.raises(DamageError, match="plan.json cannot be read as JSON"):
        load_plan(path)


# -- what was learned --------------------------------------------------------------------------------------------------


def test_what_was_learned_comes_back_with_its_programs() -> None:
    program = program_of(layers=1)
    assert program.example_inputs is not None
    inputs = [program.example_inputs[0]] * 4
    settings_ = spinpass.Learning(("transforms", "scales"), rounds=1)
    learned = spinpass.learn(program, "w4-rtn-a4", inputs, settings=settings_)
    again = Learned.from_dict(through_json(learned.to_dict()), learned.program, learned.quantized)
    assert again.to_dict() == learned.to_dict() and again.plan.spaces == learned.plan.spaces
    assert "\n" not in repr(again) and repr(again).startswith("<Learned: ") and len(repr(again)) < 600
    assert "learned" in again._repr_html_() and str(again.plan) in str(again)
    with pytest.raises(ConfigError, match="the program is rotated not at all at R1:"):
        Learned.from_dict(learned.to_dict(), program, learned.quantized)
    other = spinpass.rotate(program, RotationConfig(form="online", kind="random-hadamard", seed=3)).program
    with pytest.raises(ConfigError, match="the program is rotated by another matrix at R"):
        Learned.from_dict(learned.to_dict(), other, learned.quantized)
