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
from spinpass import record
from spinpass.analysis.basis import walk as basis
from spinpass.analysis.basis.space import Space
from spinpass.analysis.basis.spot_check import Checked, SpotCheck
from spinpass.errors import InvariantError, VerificationError
from spinpass.graph import ProgramEditor
from spinpass.graph.layout import Layout
from spinpass.passes import PassRunner, fold, fuse_norm_scale
from spinpass.passes import center as center_pass
from spinpass.passes import insert_rotations as insert_pass
from spinpass.rotations.rotation import Rotation
from tests.mutations import registry
from tests.support.decoders import Decoder, exported, made

DENSE: dict[str, dict[str, Any]] = {
    "rms": dict(norm="rms", bias=True),
    "plus": dict(norm="rms1"),
    "layer": dict(norm="ln", bias=True),
    "tied": dict(norm="rms", tied=True),
    "fused": dict(norm="rms_op", qkv="grouped", gate_up="fused", bias=True),
}
HAZARDS = {
    "experts": "BmmInOut",
    "listed experts": "ListedExperts",
    "cached": "StaticCache",
    "in place": "IndexCopyInPlace",
    "latent": "Latent",
}
ALL = ("rms", "layer", "fused", "experts", "cached")


@cache
def program(kind: str) -> ExportedProgram:
    return registry.program(HAZARDS[kind]) if kind in HAZARDS else exported(made(Decoder(**DENSE[kind])))


transform = import_module("spinpass.pipeline")  # the package's own `transform` is the function
Patch = Callable[[pytest.MonkeyPatch], None]


def queue_unless(skip: Callable[[str], bool]) -> Patch:
    """Constants whose name ``skip`` accepts are never changed."""

    def patch(m: pytest.MonkeyPatch) -> None:
        real = ProgramEditor.queue

        def queue(self: ProgramEditor, node: Any, step: Any, mixes: Any = None) -> None:
            if not skip(self.fqn(node)):
                real(self, node, step, mixes)

        m.setattr(ProgramEditor, "queue", queue)

    return patch


def rotation_with(
    change: Callable[[Rotation, torch.Tensor, int, bool, Any], torch.Tensor], names: tuple[str, ...] = ("apply",)
) -> Patch:
    def patch(m: pytest.MonkeyPatch) -> None:
        real = Rotation.apply
        m.setattr(Rotation, "apply", lambda self, x, dim=-1, *, inverse=False, dual=False: change(self, x, dim, inverse, real))

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
    return lambda m: m.setattr(transform, "PASSES", [p for p in transform.PASSES if p.name != name])


def one_less(items: Callable[[Space], Any]) -> Callable[[Space], Any]:
    return lambda space: tuple(items(space))[1:]


def other_rotation(real: Any) -> Any:
    """Online rotations are drawn anew."""

    def rotate(editor: Any, node: Any, layout: Any, rotation: Rotation, *args: Any, **options: Any) -> Any:
        other = Rotation.create("random-hadamard", rotation.size, seed=99, identity="other")
        return real(editor, node, layout, other, *args, **options)

    return rotate


def online_twice(real: Any) -> Any:
    def rotate(editor: Any, node: Any, *args: Any, **options: Any) -> Any:
        return real(editor, real(editor, node, *args, **options), *args, **options)

    return rotate


def recorded_with(change: Callable[[record.Carried], record.Carried | None]) -> Patch:
    """The record tells a wrong basis of the caches that come in."""

    def patch(m: pytest.MonkeyPatch) -> None:
        real = transform._record

        def wrong(planner: Any) -> record.Record:
            made = real(planner)
            changed = {n: change(c) for n, c in made.inputs.items()}
            return replace(made, inputs={n: c for n, c in changed.items() if c is not None})

        m.setattr(transform, "_record", wrong)

    return patch


def transposed_online(real: Any) -> Any:
    def rotate(
        editor: Any, node: Any, layout: Any, rotation: Any, stored: Any, origin: str, inverse: bool = False, **side: Any
    ) -> Any:
        return real(editor, node, layout, rotation, stored, origin, not inverse, **side)

    return rotate


MUTATIONS: dict[str, tuple[tuple[str, ...], Patch]] = {
    "a value bias is forgotten": (("rms", "layer", "experts"), queue_unless(lambda f: f.endswith("v.bias"))),
    "an output bias is forgotten": (("rms", "experts"), queue_unless(lambda f: f.endswith("o.bias"))),
    "a down bias is forgotten": (("layer", "rms"), queue_unless(lambda f: f.endswith("down.bias"))),
    "the experts' bias is forgotten": (("experts",), queue_unless(lambda f: f == "down_bias")),
    "a shared bias is forgotten": (("listed experts",), queue_unless(lambda f: f.endswith("down.bias"))),
    "a reader is skipped": (("rms", "listed experts", "cached"), queue_unless(lambda f: f.endswith("gate.weight"))),
    "a query projection is skipped": (("rms", "layer", "cached"), queue_unless(lambda f: f.endswith("q.weight"))),
    "a key projection is skipped": (("rms", "cached", "in place"), queue_unless(lambda f: f.endswith("k.weight"))),
    "an output projection is skipped": (("rms", "cached", "latent"), queue_unless(lambda f: f.endswith("o.weight"))),
    "the router is skipped": (("experts", "listed experts"), queue_unless(lambda f: f == "r.weight")),
    "the experts' first weight is skipped": (("experts",), queue_unless(lambda f: f == "gate_up")),
    "the experts' second weight is skipped": (("experts",), queue_unless(lambda f: f == "down")),
    "one expert is skipped": (("listed experts",), queue_unless(lambda f: f == "each.1.down.weight")),
    "a latent's projection is skipped": (("latent",), queue_unless(lambda f: f == "down.weight")),
    "the head is skipped": (("plus", "layer", "experts"), queue_unless(lambda f: f.endswith("head.weight"))),
    "the embedding is skipped": (("rms", "layer", "cached"), queue_unless(lambda f: f.endswith("embed.weight"))),
    "a fused projection is skipped": (("fused",), queue_unless(lambda f: f.endswith("qkv.weight"))),
    "a fused projection's bias is skipped": (("fused",), queue_unless(lambda f: f.endswith("qkv.bias"))),
    "the down projection is skipped": (("rms", "cached"), queue_unless(lambda f: f.endswith("down.weight"))),
    "weights are turned the wrong way": (ALL, rotation_with(wrong_side)),
    "weights are turned twice": (ALL, rotation_with(twice)),
    "arithmetic in half precision": (ALL, rotation_with(rounded)),
    "a rotation that is not quite orthogonal": (ALL, rotation_with(unscaled)),
    "the wrong inverse online": (ALL, attribute(insert_pass, "rotate_value", transposed_online)),
    "another rotation online": (ALL, attribute(insert_pass, "rotate_value", other_rotation)),
    "online twice": (("rms", "layer", "tied", "experts"), attribute(insert_pass, "rotate_value", online_twice)),
    "nothing online": (ALL, skipped_pass("InsertRotations")),
    "nothing folded": (ALL, skipped_pass("FoldRotations")),
    "norm scales forgotten": (("rms", "plus", "experts", "cached"), skipped_pass("FuseNormScale")),
    "centring forgotten": (("layer",), skipped_pass("Center")),
    "a writer is not centred": (
        ("layer",),
        attribute(center_pass, "_centred", lambda real: lambda tensor, layout: tensor),
    ),
    "1 + w taken for w": (
        ("plus",),
        attribute(fuse_norm_scale, "_along", lambda real: lambda scale, *at: real(scale - 1, *at)),
    ),
    "a scale is folded upside down": (
        ("rms", "layer", "experts", "cached"),
        attribute(fuse_norm_scale, "_along", lambda real: lambda scale, *at: real(1 / scale, *at)),
    ),
    "a norm's bias is forgotten": (
        ("layer",),
        attribute(fuse_norm_scale, "_shift_result", lambda real: lambda *a, **k: None),
    ),
    "one constant of every space is missed": (ALL, space_with(constants=one_less(lambda s: s.constants))),
    "the last constant of every space is missed": (ALL, space_with(constants=lambda s: s.constants[:-1])),
    "one online part of every space is missed": (ALL, space_with(entries=one_less(lambda s: s.entries))),
    "an exit is missed": (("tied",), space_with(exits=one_less(lambda s: s.exits))),
    "an exit serves a reader too few": (
        ("tied",),
        space_with(exits=lambda s: tuple(replace(x, users=x.users[1:]) for x in s.exits)),
    ),
    "one scale is left in place": (("rms", "plus", "cached"), space_with(scales=one_less(lambda s: s.scales))),
    "heads are turned as one vector": (
        ("rms", "cached"),
        attribute(
            fold,
            "rotate_constant",
            lambda real: (
                lambda editor, node, layout, rotation, **how: real(
                    editor,
                    node,
                    layout if layout.width == 24 else Layout(layout.dims, layout.sizes, layout.blocks.flip(1)),
                    rotation,
                    **how,
                )
            ),
        ),
    ),
    "fold before fuse": (
        ("rms", "layer", "experts", "cached"),
        lambda m: m.setattr(transform, "PASSES", transform.PASSES[::-1]),
    ),
    "a cache is recorded in no basis": (("cached", "in place"), recorded_with(lambda c: None)),
    "a cache is recorded in another basis": (
        ("cached", "in place"),
        recorded_with(
            lambda c: replace(c, rotation=Rotation.create("random-hadamard", c.rotation.size, seed=9, identity="other"))
        ),
    ),
}
CASES = [(mutation, kind) for mutation, (kinds, _) in MUTATIONS.items() for kind in kinds]
ONLINE = [
    (mutation, kind)
    for mutation in (
        "weights are turned the wrong way",
        "the wrong inverse online",
        "another rotation online",
        "nothing folded",
    )
    for kind in ("rms", "layer", "tied", "experts")
]


@contextmanager
def mutated(patch: Patch, *, blamed: bool = False) -> Iterator[None]:
    """With the checks on the spot and after every pass off, which notice many first: the certificate stands alone.

    The space to blame is looked for only if asked.
    """
    with pytest.MonkeyPatch.context() as m:
        m.setattr(PassRunner, "_check", lambda self, broken: None)
        m.setattr(SpotCheck, "__call__", lambda self, space: Checked(None, ()))
        if not blamed:
            m.setattr(transform, "_guilty", lambda program, made: None)
        patch(m)
        yield


@cache
def sound(kind: str, form: str) -> None:
    """The certificate passes without a mutation."""
    spinpass.transform(program(kind), settings(form))


def settings(form: str) -> spinpass.RotationConfig:
    return spinpass.RotationConfig(form=form, tied="keep", kind="random-hadamard", verify=True)  # type: ignore[arg-type]


def caught(mutation: str, kind: str, form: str) -> None:
    sound(kind, form)
    with mutated(MUTATIONS[mutation][1]), pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(kind), settings(form))


@pytest.mark.parametrize(("mutation", "kind"), CASES)
def test_the_certificate_catches(mutation: str, kind: str) -> None:
    caught(mutation, kind, "offline")


@pytest.mark.parametrize(
    ("mutation", "kind"), [*ONLINE, ("a reader is skipped", "rms"), ("a reader is skipped", "tied")]
)
def test_the_certificate_catches_in_the_online_form(mutation: str, kind: str) -> None:
    caught(mutation, kind, "online")


# What the checks after a pass notice as well, before any weight is read: the pass that they name.
NOTICED = {
    "a value bias is forgotten": ("rms", "FoldRotations"),
    "a reader is skipped": ("rms", "FuseNormScale"),
    "an output projection is skipped": ("cached", "FoldRotations"),
    "the experts' second weight is skipped": ("experts", "FoldRotations"),
    "the embedding is skipped": ("layer", "Center"),
    "a fused projection's bias is skipped": ("fused", "FoldRotations"),
    "the wrong inverse online": ("rms", "InsertRotations"),
    "online twice": ("tied", "InsertRotations"),
    "a norm's bias is forgotten": ("layer", "FuseNormScale"),
}


@pytest.mark.parametrize("mutation", NOTICED)
def test_the_check_after_the_pass_names_it(mutation: str) -> None:
    kind, named = NOTICED[mutation]
    with pytest.MonkeyPatch.context() as m:
        MUTATIONS[mutation][1](m)
        with pytest.raises(InvariantError, match=rf"^{named} broke the program at R\d:\S+: "):
            spinpass.plan(program(kind), settings("offline"))


# What the check on the spot notices before anything is edited: an operator between two values whose bases do not fit.
FORGOTTEN = [
    (mutation, kind)
    for mutation in (
        "one online part of every space is missed",
        "an exit is missed",
        "an exit serves a reader too few",
        "one scale is left in place",
    )
    for kind in MUTATIONS[mutation][0]
]


@pytest.mark.parametrize(("mutation", "kind"), FORGOTTEN)
def test_the_check_on_the_spot_refuses(mutation: str, kind: str) -> None:
    with pytest.MonkeyPatch.context() as m:
        MUTATIONS[mutation][1](m)
        plan = spinpass.plan(program(kind), settings("offline"))
    assert any("does not commute with a rotation here as its rule says" in r.why for r in plan.refusals)


def changed_constants(kind: str) -> list[str]:
    """Names of the constants that something is queued on."""
    names: set[str] = set()
    real = ProgramEditor.queue
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            ProgramEditor, "queue", lambda self, node, *step: (names.add(self.fqn(node)), real(self, node, *step))[1]
        )
        spinpass.plan(program(kind), settings("offline"))
    return sorted(names)


@pytest.mark.parametrize(
    "kind",
    [
        "rms",
        "experts",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("layer", "plus", "tied", "fused", "listed experts", "cached", "in place", "latent")
        ),
    ],
)
def test_no_constant_can_be_skipped(kind: str) -> None:
    names = changed_constants(kind)
    assert len(names) >= 8
    for name in names:
        with (
            mutated(queue_unless(lambda f, name=name: f == name)),
            pytest.raises(VerificationError, match="not equivalent"),
        ):
            spinpass.transform(program(kind), settings("offline"))


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
