"""``transform_config`` of compressed-tensors, how a checkpoint says what is rotated online:

    {"config_groups": {name: {"type", "head_dim", "precision", "apply": [{"targets", "location", "inverse"}, …]}, …}}

| type | the matrix, x -> x M/√n |
|---|---|
| ``hadamard`` | Sylvester's, of a power of two: no file holds it |
| ``random-hadamard`` | any of ±1, once per group as ``MODULE.GROUP_LOCATION.weight``, (n, n) |

Only what a loader computes online is written. Entries at ``weight_input`` and ``weight_output``, which other writers
add, say what is folded into the stored weights already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.graph import Handle, Held
from spinpass.passes import LOCATIONS, OnlineTransform, TransformLocation
from spinpass.rotations import Rotation, hadamard, is_order

_PLAIN, _STORED = "hadamard", "random-hadamard"
_FOLDED = ("weight_input", "weight_output")
_SCHEME = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
_APPLY = {"targets", "location", "inverse", "ignore"}
_PRECISION = torch.float32
REGEX = "re:"
"""What a target begins with that is a pattern of names."""

_MATRIX = re.compile(r"\.[^.]+_(input|output|weight_input|weight_output|q_attn|k_cache)\.(weight|perm)$")


@dataclass(frozen=True)
class DeclaredTransform:
    """What one entry of ``apply`` says.

    Attributes:
        group: the name of its scheme.
        stored: the matrix is in the files.
        size: of the matrix; None for as many channels as the module has there.
        targets: names of modules, ``re:`` and a pattern of names, or the names of classes.
        ignore: likewise, of modules that are none.
        location: what is rotated.
        inverse: by the transpose.
    """

    group: str
    stored: bool
    size: int | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    location: TransformLocation
    inverse: bool

    def covers(self, module: str, kind: str) -> bool:
        """Return whether a module of this path and class is meant."""
        return is_target(self.targets, module, kind) and not is_target(self.ignore, module, kind)


def is_transform(name: str) -> bool:
    """Return whether a tensor has the name of a matrix of a transform, ``MODULE.GROUP_LOCATION.weight``."""
    return _MATRIX.search(name) is not None


# -- out --------------------------------------------------------------------------------------------------------------


def transform_config(transforms: Iterable[OnlineTransform]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what ``config.json`` holds of online transforms, and the matrices that the files hold, by name.

    Raises ConfigError where one is no plain Hadamard.
    """
    groups: dict[int, dict[tuple[TransformLocation, bool], list[str]]] = {}
    for each in transforms:
        if each.rotation.kind != "hadamard" or each.rotation.order != each.rotation.size:
            raise ConfigError(f"{each.location} of {each.module} is rotated by {each.rotation}, no plain Hadamard")
        applied = groups.setdefault(each.rotation.order, {})
        applied.setdefault((each.location, each.inverse), []).append(each.module)
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for order, applied in groups.items():
        name, stored = f"hadamard{order}", order & (order - 1) != 0
        if stored:
            (location, _), (module, *_) = next(iter(applied.items()))
            signs = hadamard.matrix(order, torch.int8)
            tensors[f"{module}.{name}_{location}.weight"] = Handle(Held(signs, _PRECISION))
        config[name] = {
            "type": _STORED if stored else _PLAIN,
            "apply": [
                {"targets": modules, "location": location, "inverse": inverse, "ignore": []}
                for (location, inverse), modules in applied.items()
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": order,
            "precision": str(_PRECISION),
        }
    return {"config_groups": config}, tensors


# -- in ---------------------------------------------------------------------------------------------------------------


def declared_transforms(config: Mapping[str, Any]) -> tuple[DeclaredTransform, ...]:
    """Return what a ``transform_config`` says is computed online.

    Raises ConfigError: it says what is not known here, such as matrices that a loader draws.
    """
    found = []
    for group, scheme in (config.get("config_groups") or {}).items():
        unknown = sorted(scheme.keys() - _SCHEME)
        if unknown or scheme.get("type") not in (_PLAIN, _STORED):
            what = f"the setting {unknown[0]!r}" if unknown else f"the type {scheme.get('type')!r}"
            raise ConfigError(f"transform_config: the group {group} has {what}, which is not known here")
        if scheme.get("randomize"):
            raise ConfigError(f"transform_config: the group {group} is randomized by its loader, which no file tells")
        for applied in scheme.get("apply") or ():
            if applied.get("location") in _FOLDED:
                continue
            found.append(_declared(group, scheme, applied))
    return tuple(found)


def online_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``transform_config`` without what is folded into the stored weights."""
    groups = {
        name: {**scheme, "apply": [a for a in scheme.get("apply") or () if a.get("location") not in _FOLDED]}
        for name, scheme in config["config_groups"].items()
    }
    return {"config_groups": groups}


def _declared(group: str, scheme: Mapping[str, Any], applied: Mapping[str, Any]) -> DeclaredTransform:
    location, unknown = applied.get("location"), sorted(applied.keys() - _APPLY)
    if unknown or location not in LOCATIONS:
        what = f"the setting {unknown[0]!r}" if unknown else f"the location {location!r}"
        raise ConfigError(
            f"transform_config: the group {group} has {what}; online are known here {', '.join(LOCATIONS)}"
        )
    size = scheme.get("head_dim")
    if not (size is None or (isinstance(size, int) and size > 0)):
        raise ConfigError(f"transform_config: the group {group} has head_dim {size!r}, which is no size")
    return DeclaredTransform(
        str(group),
        scheme["type"] == _STORED,
        size,
        _names(applied.get("targets")),
        _names(applied.get("ignore")),
        cast(TransformLocation, location),
        bool(applied.get("inverse")),
    )


def _names(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(map(str, given or ()))


def is_target(targets: Sequence[str], module: str, kind: str) -> bool:
    """Return whether one of the targets means a module of this path and class, by compressed-tensors' rule."""
    return any(
        re.match(target.removeprefix(REGEX), module) is not None
        if target.startswith(REGEX)
        else target in (module, kind)
        for target in targets
    )


def resolved_transforms(
    declared: Sequence[DeclaredTransform],
    places: Mapping[TransformLocation, Mapping[str, tuple[str, int]]],
    tensors: Mapping[str, Tensor],
) -> tuple[OnlineTransform, ...]:
    """Return the transforms of a model's modules that a checkpoint declares.

    Args:
        declared: by the checkpoint.
        places: what the model has: by location the modules, with their class and the channels there.
        tensors: of the checkpoint, the matrices of transforms among them, float (n, n).

    Raises:
        ConfigError: an entry is of no module of the model; a matrix is missing, or is none of ±1 with orthogonal rows;
            a matrix is stored that nothing declares; queries and keys are rotated differently.
    """
    found: list[OnlineTransform] = []
    used: set[str] = set()
    for each in declared:
        modules = {m: width for m, (kind, width) in places[each.location].items() if each.covers(m, kind)}
        if not modules:
            raise ConfigError(
                f"transform_config: the group {each.group} is of {each.location} of {', '.join(each.targets)}, which "
                "the model has not"
            )
        for module, width in modules.items():
            size = each.size or width
            found.append(OnlineTransform(module, each.location, _rotation(each, size, tensors, used), each.inverse))
    left = sorted(tensors.keys() - used)
    if left:
        raise ConfigError(f"the files hold {left[0]}, a matrix of a transform that config.json does not declare")
    _check_scores(found)
    return tuple(found)


def _rotation(declared: DeclaredTransform, size: int, tensors: Mapping[str, Tensor], used: set[str]) -> Rotation:
    names = [name for name in tensors if name.split(".")[-2].startswith(f"{declared.group}_")]
    held = {name: tensors[name] for name in names if tensors[name].shape == (size, size)}
    used.update(held)
    if not declared.stored:
        if size & (size - 1):
            raise ConfigError(
                f"transform_config: the group {declared.group} is a plain Hadamard of {size} channels, which is no "
                "power of two"
            )
        wrong = [name for name, t in held.items() if not torch.equal(t.float(), hadamard.matrix(size, torch.float32))]
        if wrong:
            raise ConfigError(f"{wrong[0]} is another matrix than Sylvester's, which config.json declares")
        return Rotation.create("hadamard", size)
    if not held:
        raise ConfigError(
            f"transform_config: no file holds the matrix of {size} channels of the group {declared.group}: without it "
            "a loader draws another"
        )
    first, *others = held.items()
    for name, tensor in others:
        if not torch.equal(tensor, first[1]):
            raise ConfigError(f"{name} and {first[0]} are of one group, and differ")
    return _of_signs(*first)


def _of_signs(name: str, matrix: Tensor) -> Rotation:
    """Return the rotation by a stored matrix of ±1."""
    exact = matrix.double()
    if not bool((exact.abs() == 1).all()):
        raise ConfigError(f"{name} is no matrix of ±1, as the type {_STORED} has it")
    if is_order(len(exact)) and torch.equal(exact, hadamard.matrix(len(exact))):
        return Rotation.create("hadamard", len(exact))
    return Rotation.from_matrix(exact / len(exact) ** 0.5)


def _check_scores(transforms: Sequence[OnlineTransform]) -> None:
    """Raise ConfigError where scores of rotated queries and keys are others than those of the vectors themselves."""
    sides: dict[str, dict[str, tuple[Rotation, bool]]] = {}
    for each in transforms:
        if each.location != "input":
            sides.setdefault(each.module, {})[each.location] = (each.rotation, each.inverse)
    for module, side in sides.items():
        if side.get("q_attn") != side.get("k_cache"):
            raise ConfigError(
                f"transform_config: queries and keys of {module} are not rotated alike, so that its scores are others"
            )
