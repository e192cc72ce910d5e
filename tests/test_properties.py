"""Random small decoders under random settings: the same function, every rotation found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.export import Dim

import spinpass
from spinpass.certificate.programs import run
from tests.support.decoders import NORMS, Decoder, Shape, exported, made, outcome, relative_error, tokens

HEADS = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (4, 1)])
SHAPES = st.builds(
    lambda heads, **rest: Shape(heads=heads[0], kv=heads[1], **rest),
    heads=HEADS,
    norm=st.sampled_from(sorted(NORMS)),
    bias=st.booleans(),
    tied=st.booleans(),
    rope=st.booleans(),
    parallel=st.booleans(),
    gated=st.booleans(),
    qkv=st.sampled_from(["split", "fused", "grouped"]),
    gate_up=st.sampled_from(["split", "fused"]),
    qk_norm=st.booleans(),
    spelled=st.booleans(),
    positions=st.booleans(),
    post_norm=st.booleans(),
    layers=st.sampled_from([1, 2]),
    hidden=st.sampled_from([12, 24, 20]),
    ffn=st.sampled_from([16, 28, 36]),
    head=st.sampled_from([4, 8, 12]),
)
SETTINGS = st.fixed_dictionaries(
    dict(
        form=st.sampled_from(["auto", "offline", "online"]),
        tied=st.sampled_from(["keep", "untie", "auto"]),
        kind=st.sampled_from(["hadamard", "random-hadamard", "random-matrix"]),
        block_size=st.sampled_from([None, 2, 4]),
        seed=st.integers(0, 5),
        rotations=st.sets(st.sampled_from(["R1", "R2", "R3", "R4"]), min_size=1).map(tuple),
    )
)
MODES = st.sampled_from(["plain", "functional", "decomposed", "dynamic"])
FAST = (Phase.explicit, Phase.generate)  # shrinking exports programs for minutes; run the wide sweep for that
quick = settings(max_examples=25, phases=FAST, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
wide = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def effective(choice: dict[str, Any]) -> dict[str, Any]:
    """The settings of a choice that change something beside the others: the rest is refused."""
    unused = {"seed"} if choice["kind"] == "hadamard" else set()
    unused |= set() if "R1" in choice["rotations"] else {"form", "tied"}
    return {name: value for name, value in choice.items() if name not in unused}


def check(shape: Shape, choice: dict[str, Any], mode: str) -> None:
    options = (
        {"dynamic_shapes": {"ids": {0: Dim.AUTO, 1: Dim.AUTO}}} if mode == "dynamic" and not shape.positions else {}
    )
    program = exported(made(Decoder(shape), seed=choice["seed"]), **options)
    if mode in ("functional", "decomposed"):
        program = program.run_decompositions({}) if mode == "functional" else program.run_decompositions()
    found = outcome(program, **effective(choice))
    assert found.error <= 1e-9, str(found.plan)
    assert found.roles() == set(choice["rotations"]), found.refusal or str(found.plan)
    if options:
        assert found.result is not None
        other = tokens(seq=3, batch=4)
        assert relative_error(run(program, (other,), float64=True), run(found.result, (other,), float64=True)) <= 1e-9


@quick
@given(shape=SHAPES, choice=SETTINGS, mode=MODES)
def test_random_decoders(shape: Shape, choice: dict[str, Any], mode: str) -> None:
    check(shape, choice, mode)


@pytest.mark.slow
@wide
@given(shape=SHAPES, choice=SETTINGS, mode=MODES)
def test_many_random_decoders(shape: Shape, choice: dict[str, Any], mode: str) -> None:
    check(shape, choice, mode)


@settings(max_examples=6, phases=FAST, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_random_decoders_in_narrow_dtypes_pass_the_certificate(shape: Shape, dtype: torch.dtype) -> None:
    program = exported(made(Decoder(shape), dtype=dtype))
    after = spinpass.transform(program, spinpass.RotationConfig(verify=True))
    assert {t.dtype for t in after.state_dict.values()} <= {dtype, torch.float32}


@settings(max_examples=10, phases=FAST, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, data=st.data())
def test_a_wrong_element_fails(shape: Shape, data: st.DataObject) -> None:
    """The checks above are not blind: after one changed weight they fail."""
    program = exported(made(Decoder(shape)))
    after = spinpass.transform(program, spinpass.RotationConfig(verify=False))
    name = data.draw(
        st.sampled_from(sorted(k for k in after.state_dict if k.endswith(("o.weight", "down.weight", "head.weight"))))
    )
    tensor = after.state_dict[name].detach().clone()
    at = data.draw(st.integers(0, tensor.numel() - 1)) if not name.startswith("embed") else 0
    tensor.view(-1)[at] += 1e-3
    after.state_dict[name] = torch.nn.Parameter(tensor)
    assert not spinpass.verify(program, after).ok
