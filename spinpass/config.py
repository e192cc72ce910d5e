"""What to rotate and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from spinpass.errors import ConfigError

Role = Literal["R1", "R2", "R3", "R4", "latent", "heads"]
Kind = Literal["hadamard", "random-hadamard", "random-matrix"]
Tied = Literal["keep", "untie", "auto"]
Form = Literal["auto", "offline", "online"]
CacheBasis = Literal["rotated", "plain"]
ROLES: tuple[Role, ...] = get_args(Role)
DEFAULT_ROLES: tuple[Role, ...] = ("R1", "R2", "R3", "R4", "latent")


@dataclass(frozen=True)
class Override:
    """Settings of one rotation (``R2``) or one space (``R4:model.layers.3.mlp.down_proj``, patterns allowed). None:
    as configured.
    """

    kind: Kind | None = None
    block_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        _check_block_size(self.block_size)


@dataclass(frozen=True)
class RotationConfig:
    """Which rotations to insert, in which form.

    Args:
        rotations: any subset of R1 (residual stream), R2 (value heads), R3 (query and key heads), R4 (input of the
            down projection), latent (whatever else lies between linears and folds entirely: MLA latents, embedding
            projections) and heads (one online Hadamard across all heads at the input of the output projection, on top
            of R2; not by default: it pays for low-bit activations).
        kind: ``hadamard`` (deterministic), ``random-hadamard`` (with random signs) or ``random-matrix`` (random
            orthogonal, dense: slow where it stays online).
        block_size: rotate in diagonal blocks of this size; it must divide the size of every space. None: whole spaces.
        seed: of the random kinds. The rotation of a space depends on the seed and the space's name only, so that the
        prefill and
            decode programs of one model get the same bases.
        tied: an embedding table shared with the head: ``keep`` leaves the table as it is and rotates online after
        the lookup and
            before the final norm's scale (no bytes), ``untie`` gives the head a table of its own (vocab × hidden more
            parameters, nothing online), ``auto`` unties only where that adds less than 1% to the program's constants.
        form: of R1. ``offline``: in the residual stream, norm scales folded into the linears. ``online``: one
        Hadamard after each
            norm, shared by the linears that read it, norm scales left in place. ``auto``: offline where the stream
            needs at most half as many online parts as the online form would (those at the two ends of a tied table
            aside), else online.
        cache: ``rotated`` lets a KV cache enter and leave the program in the rotated basis; ``plain`` keeps it as it
        was, and leaves
            out the rotations that would change it.
        overrides: settings per rotation or per space name.
        matrices: rotation matrices of your own, per rotation or per space name: (n, n), orthogonal, float32 or float64.
        exclude: patterns of space names or of parameter names; a space that matches is left alone.
        verify: certify the result. None: where the program is small (:data:`spinpass.transform.VERIFY_LIMIT`
        parameters).

    Raises:
        ConfigError: for a value that cannot be used.
    """

    rotations: tuple[Role, ...] = DEFAULT_ROLES
    kind: Kind = "hadamard"
    block_size: int | None = None
    seed: int = 0
    tied: Tied = "auto"
    form: Form = "auto"
    cache: CacheBasis = "rotated"
    overrides: Mapping[str, Override] = field(default_factory=dict)
    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    verify: bool | None = None

    def __post_init__(self) -> None:
        chosen = (
            tuple(r.strip() for r in self.rotations.split(","))
            if isinstance(self.rotations, str)
            else tuple(self.rotations)
        )
        unknown = [r for r in chosen if r not in ROLES]
        if unknown:
            raise ConfigError(f"unknown rotation {unknown[0]!r}; choose from {', '.join(ROLES)}")
        if not chosen:
            raise ConfigError(f"no rotation is chosen; choose from {', '.join(ROLES)}")
        object.__setattr__(self, "rotations", tuple(r for r in ROLES if r in chosen))
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        _check_kind(self.kind)
        _check_block_size(self.block_size)
        for name, value, allowed in (
            ("tied", self.tied, get_args(Tied)),
            ("form", self.form, get_args(Form)),
            ("cache", self.cache, get_args(CacheBasis)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r} is not an integer")
        for key in (*self.overrides, *self.matrices):
            if key.split(":")[0] not in ROLES:
                raise ConfigError(
                    f"{key!r} names neither a rotation nor a space; a space's name begins with its rotation, as in "
                    "'R2:model.layers.0.self_attn' (see spinpass.plan)"
                )
        for key, matrix in self.matrices.items():
            if not isinstance(matrix, Tensor):
                raise ConfigError(f"the matrix for {key!r} is a {type(matrix).__name__}, not a torch.Tensor")

    def settings(self, name: str) -> Override:
        """Kind, block size and seed for the space ``name``; the most specific override wins."""
        chosen = Override(self.kind, self.block_size, self.seed)
        for key in sorted((k for k in self.overrides if _covers(k, name)), key=len):
            given = self.overrides[key]
            chosen = replace(
                chosen, **{f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) is not None}
            )
        return chosen

    def matrix(self, name: str) -> Tensor | None:
        """The user's matrix for the space ``name``, if one was given."""
        keys = sorted((k for k in self.matrices if _covers(k, name)), key=len)
        return self.matrices[keys[-1]] if keys else None

    def excludes(self, name: str, fqns: list[str]) -> str | None:
        """The pattern that excludes the space, or None."""
        names = [name, name.split(":", 1)[-1], *fqns]
        return next((p for p in self.exclude if any(fnmatch.fnmatchcase(n, p) for n in names)), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the user's matrices by name only."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("overrides", "matrices")}
        return {
            **plain,
            "rotations": list(self.rotations),
            "exclude": list(self.exclude),
            "overrides": {k: {f.name: getattr(v, f.name) for f in fields(v)} for k, v in self.overrides.items()},
            "matrices": sorted(self.matrices),
        }


def _covers(key: str, name: str) -> bool:
    return key == name.split(":")[0] or fnmatch.fnmatchcase(name, key)


def _check_kind(kind: object) -> None:
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(
            f"kind={kind!r} is not one of {', '.join(get_args(Kind))}; pass a matrix of your own in `matrices`"
        )


def _check_block_size(block_size: object) -> None:
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ConfigError(f"block_size={block_size!r} is not a positive integer")
