"""What to rotate and how."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.rotations import Rotation

Role = Literal["R1", "R2", "R3", "R4", "latent", "heads", "gates"]
Kind = Literal["hadamard", "random-hadamard", "random-matrix"]
Tied = Literal["keep", "untie", "auto"]
Form = Literal["auto", "offline", "online"]
CacheBasis = Literal["rotated", "plain"]
Matrix = Tensor | Rotation
"""A matrix of the user's: the matrix itself, or the change of basis that was made of it."""
ROLES: tuple[Role, ...] = get_args(Role)
DEFAULT_ROLES: tuple[Role, ...] = ("R1", "R2", "R3", "R4", "latent")


@dataclass(frozen=True)
class Override:
    """Settings of one rotation (``R2``) or one space (``R4:model.layers.3.mlp.down_proj``, patterns allowed).

    A field that is None is taken from the :class:`RotationConfig`, where all three fields are explained.

    Raises:
        ConfigError: an unknown kind, or a block size that is no positive integer.
    """

    kind: Kind | None = None
    block_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        _check_block_size(self.block_size)
        if self.seed is not None and not _is_integer(self.seed):
            raise ConfigError(f"seed={self.seed!r} is not an integer")


@dataclass(frozen=True)
class RotationConfig:
    """Which rotations to insert, in which form.

    Args:
        rotations: any subset of the roles, or a string of them joined by commas.
            ``R1`` rotates the residual stream.
            ``R2`` rotates the value heads.
            ``R3`` rotates the query and key heads.
            ``R4`` rotates the input of the down projection.
            ``latent`` rotates whatever else lies between linears and folds entirely: MLA latents, embedding
            projections.
            ``heads`` puts one online Hadamard across all heads at the input of the output projection, on top of R2. It
            is not among the defaults: it pays for low-bit activations.
            ``gates`` folds an order of channels, or a scale for each, into the layers around act(g) · u. It takes what
            ``matrices`` has for it and nothing else: no other matrix passes there.
        kind: what matrix rotates. ``hadamard`` is deterministic, ``random-hadamard`` has random signs, and
            ``random-matrix`` is random orthogonal and dense, hence slow where it stays online.
        block_size: rotate in diagonal blocks of this size, which must divide the size of every space. None rotates
            whole spaces.
        seed: of the random kinds. The rotation of a space depends on the seed and the space's name only, so that the
            prefill and decode programs of one model get the same bases.
        tied: what to do with an embedding table that the head shares.
            ``keep`` leaves the table alone and rotates online, after the lookup and before the final norm's scale. It
            adds no bytes.
            ``untie`` gives the head a table of its own. It adds vocab × hidden parameters and nothing online.
            ``auto`` unties only where that adds less than 1% to the program's constants.
        form: of R1.
            ``offline`` rotates in the residual stream and folds norm scales into the linears.
            ``online`` puts one Hadamard after each norm, which the linears that read the norm share, and leaves norm
            scales in place.
            ``auto`` takes offline where the stream needs at most half as many online parts as the online form would,
            not counting those at the two ends of a tied table. Elsewhere it takes online.
        cache: the basis of a KV cache. ``rotated`` lets it enter and leave the program in the rotated basis. ``plain``
            keeps it in the original basis and leaves out the rotations that would change it.
        overrides: settings per rotation or per space name.
        matrices: matrices of your own, per rotation or per space name: (n, n), float32 or float64; a vector x becomes
            x @ matrix. They are orthogonal, or invertible where the space admits that, as :func:`spinpass.plan` says.
            A stack (heads, n, n) has one for each key/value head, where the plan says so. Of R3 they are the keys', and
            queries take the inverse transposed. Of ``gates`` they are a vector (n,) of scales of u, or one of integers,
            an order of channels. A :class:`spinpass.Rotation`, for example of
            :meth:`spinpass.Rotation.from_factors`, is taken as it is. A sequence of them, for a rotation, has one for
            each of its spaces, in the order in which the program computes them
            (:func:`spinpass.formats.read_matrices`).
        exclude: patterns of space names or of parameter names. A space that matches is not rotated.
        verify: whether to certify the result. None certifies as well; False does not.

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
    matrices: Mapping[str, Matrix | Sequence[Matrix]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    verify: bool | None = None

    def __post_init__(self) -> None:
        given: Any = self.rotations.split(",") if isinstance(self.rotations, str) else self.rotations
        chosen = tuple(name.strip() for name in _names("rotations", given))
        unknown = [r for r in chosen if r not in ROLES]
        if unknown:
            raise ConfigError(f"unknown rotation {unknown[0]!r}; choose from {', '.join(ROLES)}")
        if not chosen:
            raise ConfigError(f"no rotation is chosen; choose from {', '.join(ROLES)}")
        object.__setattr__(self, "rotations", tuple(r for r in ROLES if r in chosen))
        patterns = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        object.__setattr__(self, "exclude", _names("exclude", patterns))
        if self.kind is None:
            raise ConfigError(f"kind=None is not one of {', '.join(get_args(Kind))}")
        _check_kind(self.kind)
        _check_block_size(self.block_size)
        for name, value, allowed in (
            ("tied", self.tied, get_args(Tied)),
            ("form", self.form, get_args(Form)),
            ("cache", self.cache, get_args(CacheBasis)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not _is_integer(self.seed):
            raise ConfigError(f"seed={self.seed!r} is not an integer")
        if self.verify not in (None, True, False) or _is_integer(self.verify):
            raise ConfigError(f"verify={self.verify!r} is not True, False or None")
        for name, keyed in (("overrides", self.overrides), ("matrices", self.matrices)):
            if not isinstance(keyed, Mapping) or not all(isinstance(key, str) for key in keyed):
                raise ConfigError(f"{name}={keyed!r} is no mapping by the names of rotations or spaces")
        for key, override in self.overrides.items():
            if not isinstance(override, Override):
                raise ConfigError(f"the override for {key!r} is a {type(override).__name__}, not a spinpass.Override")
        for key in (*self.overrides, *self.matrices):
            if key.split(":")[0] not in ROLES:
                raise ConfigError(
                    f"{key!r} names neither a rotation nor a space; a space's name begins with its rotation, as in "
                    "'R2:model.layers.0.self_attn' (see spinpass.plan)"
                )
        for key, given in self.matrices.items():
            _check_matrices(key, given)
        self._check_effect()

    def _check_effect(self) -> None:
        """Raise ConfigError where a setting would change nothing, whatever the program is."""
        kinds = {self.kind, *(each.kind for each in self.overrides.values())}
        if self.seed != 0 and kinds <= {"hadamard", None}:
            raise ConfigError(
                f"seed={self.seed} changes nothing: kind='hadamard' draws nothing; choose random-hadamard or "
                "random-matrix, or leave the seed out"
            )
        for name, value in (("form", self.form), ("tied", self.tied)):
            if value != "auto" and "R1" not in self.rotations:
                raise ConfigError(
                    f"{name}={value!r} is of R1, and R1 is not among the rotations ({', '.join(self.rotations)}): add "
                    f"R1, or leave {name} out"
                )

    def check_used(self, spaces: Collection[str], parameters: Collection[str]) -> None:
        """Make sure that every key and every pattern speaks of something in a program.

        Args:
            spaces: the names of all spaces that were considered.
            parameters: the names of all parameters.

        Raises:
            ConfigError: one of ``overrides``, ``matrices`` or ``exclude`` speaks of nothing; the nearest name is told.
                There are more matrices in a sequence than spaces, or fewer.
        """
        for role, matrices in self.matrices.items():
            of_role = [name for name in spaces if name.split(":")[0] == role]
            if not isinstance(matrices, Matrix) and role in self.rotations and len(matrices) != len(of_role):
                raise ConfigError(
                    f"there are {len(matrices)} matrices for {role}, and {len(of_role)} spaces for it in this program: "
                    "they belong to another model, or to another form of the rotation (see spinpass.plan)"
                )
        for name, keyed in (("overrides", self.overrides), ("matrices", self.matrices)):
            for key in keyed:
                role = key.split(":")[0]
                if role not in self.rotations:
                    raise ConfigError(
                        f"{name} has {key!r}, and {role} is not among the rotations: ask for it as well "
                        f"({','.join([*self.rotations, role])})"
                    )
                if ":" in key and not fnmatch.filter(spaces, key):
                    raise ConfigError(
                        f"{name} has {key!r}, which is no space of this program{nearest_name(key, spaces)}"
                    )
        names = {*spaces, *(name.split(":", 1)[-1] for name in spaces), *parameters}
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                role = pattern.split(":")[0]
                near = nearest_name(pattern, [name for name in spaces if name.split(":")[0] == role] or names)
                raise ConfigError(f"exclude has {pattern!r}, which is no space and no parameter of this program{near}")

    def settings(self, name: str) -> Override:
        """The kind, block size and seed for the space ``name``. Field by field the longest key wins."""
        chosen = Override(self.kind, self.block_size, self.seed)
        for key in sorted((k for k in self.overrides if _covers(k, name)), key=len):
            given = self.overrides[key]
            chosen = replace(
                chosen, **{f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) is not None}
            )
        return chosen

    def matrix(self, name: str, place: int = 0) -> Matrix | None:
        """The user's matrix for the space ``name``, or None. The longest key that matches wins.

        ``place`` is that of the space among those of its rotation. A sequence that ends before it has none.
        """
        keys = sorted((k for k in self.matrices if _covers(k, name)), key=len)
        found = self.matrices[keys[-1]] if keys else None
        if found is None or isinstance(found, Matrix):
            return found
        return found[place] if place < len(found) else None

    def excludes(self, name: str, fqns: list[str]) -> str | None:
        """The pattern that excludes the space ``name``, whose parameters are ``fqns``, or None."""
        names = [name, name.split(":", 1)[-1], *fqns]
        return next((p for p in self.exclude if any(fnmatch.fnmatchcase(n, p) for n in names)), None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it. Of the user's matrices it has the names only."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("overrides", "matrices")}
        return {
            **plain,
            "rotations": list(self.rotations),
            "exclude": list(self.exclude),
            "overrides": {k: {f.name: getattr(v, f.name) for f in fields(v)} for k, v in self.overrides.items()},
            "matrices": sorted(self.matrices),
        }

    @staticmethod
    def from_dict(
        data: Mapping[str, Any], matrices: Mapping[str, Matrix | Sequence[Matrix]] | None = None
    ) -> RotationConfig:
        """The configuration that :meth:`to_dict` has written, with the matrices that it names.

        Raises ConfigError: it is none, or the matrices are not those that it names.
        """
        try:
            plain = dict(data)
            named = list(_names("matrices", plain.pop("matrices")))
            overrides = {key: Override(**each) for key, each in plain.pop("overrides").items()}
            plain |= {key: tuple(plain[key]) for key in ("rotations", "exclude")}
            made = RotationConfig(**plain, overrides=overrides, matrices=matrices or {})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no configuration of rotations ({error}): rotate the original again") from error
        if sorted(made.matrices) != named:
            given = ", ".join(sorted(made.matrices)) or "none"
            raise ConfigError(
                f"matrices were given for {', '.join(named) or 'nothing'}, and now for {given}: give those"
            )
        return made


def nearest_name(key: str, names: Collection[str]) -> str:
    """Return the end of a message on a key that is none of the names: the one most like it, nothing without names."""
    found = difflib.get_close_matches(key, sorted(names), 1, 0.0)
    return f"; the nearest is {found[0]!r}" if found else ""


def _names(field_name: str, given: Any) -> tuple[str, ...]:
    """Return the names as a tuple. Raises ConfigError where they are none."""
    if not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{field_name}={given!r} is no sequence of names")
    return tuple(given)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _covers(key: str, name: str) -> bool:
    return key == name.split(":")[0] or fnmatch.fnmatchcase(name, key)


def _check_matrices(key: str, given: object) -> None:
    """Raise ConfigError where something is neither a matrix nor, for a rotation, a sequence of them."""
    several = isinstance(given, (list, tuple)) and given
    if several and key not in ROLES:
        raise ConfigError(
            f"{key!r} has several matrices: a sequence of them is for all spaces of a rotation, as in 'R2'"
        )
    for matrix in given if several else (given,):  # type: ignore[attr-defined]
        if not isinstance(matrix, Matrix):
            raise ConfigError(
                f"the matrix for {key!r} is a {type(matrix).__name__}, neither a torch.Tensor nor a spinpass.Rotation"
            )


def _check_kind(kind: object) -> None:
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(
            f"kind={kind!r} is not one of {', '.join(get_args(Kind))}; pass a matrix of your own in `matrices`"
        )


def _check_block_size(block_size: Any) -> None:
    if block_size is not None and (not _is_integer(block_size) or block_size < 1):
        raise ConfigError(f"block_size={block_size!r} is not a positive integer: choose 1 or more")
