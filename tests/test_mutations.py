"""The pass broken on purpose, in the ways rotation tools break: the certificate must catch every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import basis
from spinpass.basis import Space
from spinpass.errors import VerificationError
from spinpass.layout import Layout
from spinpass.passes import center as center_pass
from spinpass.passes import fold, fuse_norm_scale
from spinpass.passes import insert_rotations as insert_pass
from spinpass.program import ProgramEditor
from spinpass.rotation import Rotation
from tests.decoders import Decoder, exported, made


@cache
def program(kind: str) -> ExportedProgram:
    settings: dict[str, Any] = {
        "rms": dict(norm="rms", bias=True),
        "plus": dict(norm="rms1"),
        "layer": dict(norm="ln", bias=True),
        "tied": dict(norm="rms", tied=True),
        "fused": dict(norm="rms_op", qkv="grouped", gate_up="fused", bias=True),
    }
    return exported(made(Decoder(**settings[kind])))


transform = import_module("spinpass.transform")  # the package's own `transform` is the function
Patch = Callable[[pytest.MonkeyPatch], None]


def queue_unless(skip: Callable[[str], bool]) -> Patch:
    """Constants whose name ``skip`` accepts are never changed."""

    def patch(m: pytest.MonkeyPatch) -> None:
        real = ProgramEditor.queue

        def queue(self: ProgramEditor, node: Any, step: Any) -> None:
            if not skip(self.fqn(node)):
                real(self, node, step)

        m.setattr(ProgramEditor, "queue", queue)

    return patch


def rotation_with(
    change: Callable[[Rotation, torch.Tensor, int, bool, Any], torch.Tensor], names: tuple[str, ...] = ("apply",)
) -> Patch:
    def patch(m: pytest.MonkeyPatch) -> None:
        real = Rotation.apply
        m.setattr(Rotation, "apply", lambda self, x, dim=-1, *, inverse=False: change(self, x, dim, inverse, real))

    return patch


def wrong_side(self: Rotation, x: torch.Tensor, dim: int, inverse: bool, real: Any) -> torch.Tensor:
    return real(self, x, dim, inverse=not inverse)


def twice(self: Rotation, x: torch.Tensor, dim: int, inverse: bool, real: Any) -> torch.Tensor:
    return real(self, real(self, x, dim, inverse=inverse), dim, inverse=inverse)


def rounded(self: Rotation, x: torch.Tensor, dim: int, inverse: bool, real: Any) -> torch.Tensor:
    return real(self, x.to(torch.bfloat16), dim, inverse=inverse).to(x.dtype)


def unscaled(self: Rotation, x: torch.Tensor, dim: int, inverse: bool, real: Any) -> torch.Tensor:
    return real(self, x, dim, inverse=inverse) * (1 + 1e-6)


def attribute(owner: Any, name: str, made_of: Callable[[Any], Any]) -> Patch:
    return lambda m: m.setattr(owner, name, made_of(getattr(owner, name)))


def space_with(**changes: Callable[[Space], Any]) -> Patch:
    """The analysis forgets something."""

    def patch(m: pytest.MonkeyPatch) -> None:
        real = basis.Walk.grow

        def grow(self: basis.Walk, seed: Any, layout: Layout) -> Space:
            space = real(self, seed, layout)
            return replace(space, **{k: v(space) for k, v in changes.items()})

        m.setattr(basis.Walk, "grow", grow)

    return patch


def skipped_pass(name: str) -> Patch:
    return lambda m: m.setattr(transform, "PASSES", [p for p in transform.PASSES if p[0] != name])


def one_less(items: Callable[[Space], Any]) -> Callable[[Space], Any]:
    return lambda space: tuple(items(space))[1:]


def transposed_online(real: Any) -> Any:
    def rotate(
        editor: Any, node: Any, layout: Any, rotation: Any, stored: Any, origin: str, inverse: bool = False
    ) -> Any:
        return real(editor, node, layout, rotation, stored, origin, not inverse)

    return rotate


MUTATIONS: dict[str, tuple[str, Patch]] = {
    "a value bias is forgotten": ("rms", queue_unless(lambda f: f.endswith("v.bias"))),
    "an output bias is forgotten": ("rms", queue_unless(lambda f: f.endswith("o.bias"))),
    "a down bias is forgotten": ("layer", queue_unless(lambda f: f.endswith("down.bias"))),
    "a reader is skipped": ("rms", queue_unless(lambda f: f.endswith("gate.weight"))),
    "the head is skipped": ("plus", queue_unless(lambda f: f.endswith("head.weight"))),
    "the embedding is skipped": ("rms", queue_unless(lambda f: f.endswith("embed.weight"))),
    "a fused projection is skipped": ("fused", queue_unless(lambda f: f.endswith("qkv.weight"))),
    "the down projection is skipped": ("rms", queue_unless(lambda f: f.endswith("down.weight"))),
    "weights are turned the wrong way": ("rms", rotation_with(wrong_side)),
    "weights are turned twice": ("rms", rotation_with(twice)),
    "arithmetic in half precision": ("rms", rotation_with(rounded)),
    "a rotation that is not quite orthogonal": ("rms", rotation_with(unscaled)),
    "the wrong inverse online": ("rms", attribute(insert_pass, "rotate", transposed_online)),
    "nothing online": ("rms", skipped_pass("InsertRotations")),
    "nothing folded": ("rms", skipped_pass("FoldRotations")),
    "norm scales forgotten": ("rms", skipped_pass("FuseNormScale")),
    "centring forgotten": ("layer", skipped_pass("Center")),
    "a writer is not centred": (
        "layer",
        attribute(center_pass, "_centred", lambda real: lambda tensor, layout: tensor),
    ),
    "1 + w taken for w": (
        "plus",
        attribute(fuse_norm_scale, "_along", lambda real: lambda scale, dim, rank: real(scale - 1, dim, rank)),
    ),
    "a norm's bias is forgotten": (
        "layer",
        attribute(fuse_norm_scale, "_shift_result", lambda real: lambda *a, **k: None),
    ),
    "one constant of every space is missed": ("rms", space_with(constants=one_less(lambda s: s.constants))),
    "one online part of every space is missed": ("rms", space_with(entries=one_less(lambda s: s.entries))),
    "an exit is missed": ("tied", space_with(exits=one_less(lambda s: s.exits))),
    "one scale is left in place": ("rms", space_with(scales=one_less(lambda s: s.scales))),
    "heads are turned as one vector": (
        "rms",
        attribute(
            fold,
            "rotate_constant",
            lambda real: (
                lambda editor, node, layout, rotation: real(
                    editor,
                    node,
                    layout if layout.width == 24 else Layout(layout.dims, layout.sizes, layout.blocks.flip(1)),
                    rotation,
                )
            ),
        ),
    ),
    "fold before fuse": ("rms", lambda m: m.setattr(transform, "PASSES", transform.PASSES[::-1])),
}


@contextmanager
def mutated(patch: Patch) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as m:
        patch(m)
        yield


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_certificate_catches(mutation: str) -> None:
    kind, patch = MUTATIONS[mutation]
    config = spinpass.RotationConfig(form="offline", tied="keep", kind="random-hadamard", verify=True)
    spinpass.transform(program(kind), config)  # sound without the mutation
    with mutated(patch), pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(kind), config)


@pytest.mark.parametrize("kind", ["rms", "layer", "tied"])
@pytest.mark.parametrize(
    "mutation", ["weights are turned the wrong way", "the wrong inverse online", "a reader is skipped"]
)
def test_the_certificate_catches_in_the_online_form(kind: str, mutation: str) -> None:
    config = spinpass.RotationConfig(form="online", kind="random-hadamard", verify=True)
    with mutated(MUTATIONS[mutation][1]), pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(kind), config)


def test_every_changed_element_is_noticed() -> None:
    """One element of one constant off by a hundred-thousandth."""
    before = program("rms")
    after = spinpass.transform(before)
    for name, tensor in after.state_dict.items():  # what did not change is shared with the original
        after.state_dict[name] = torch.nn.Parameter(tensor.detach().clone())
    for name in sorted(after.state_dict.keys() - {"embed.weight"}):  # only some rows are looked up
        tensor = after.state_dict[name]
        with torch.no_grad():
            old = tensor.flatten()[3].clone()
            tensor.view(-1)[3] += 1e-5
        used = any(
            s.target == name and any(n.name == s.arg.name and n.users for n in after.graph.nodes)
            for s in after.graph_signature.input_specs
        )
        assert spinpass.verify(before, after).ok != used, name
        with torch.no_grad():
            tensor.view(-1)[3] = old
    assert spinpass.verify(before, after).ok
