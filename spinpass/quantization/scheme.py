"""What to quantize and how: values that check themselves, and a short spelling of them, ``w4g128-gptq-a8-kv4``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from spinpass.config import nearest_name
from spinpass.errors import ConfigError
from spinpass.learning import Learning

from .kinds import check_kinds
from .spelling import LEARNED, parts_of

Method = Literal["rtn", "gptq"]
Calibration = Literal["mse", "percentile", "minmax"]
ScaleDtype = Literal["float16", "bfloat16"]
MASSIVE = 8.0
"""Times the median of all tokens' largest values, above which a token is massive."""
FINE = 8
"""Bits at which there is nothing to win by ranges, or by what values are rounded to; massive tokens have as many."""
WEIGHT_BITS = (2, 3, 4, 8)
"""The widths that codes of weights may have."""
GROUP_SIZES = (16, 32, 64, 128, 256)
"""The numbers of inputs that may share a scale."""


@dataclass(frozen=True)
class Weights:
    """How weights of linear layers become codes.

    Args:
        bits: the width of a code, 2, 3, 4 or 8.
        group_size: how many weights along the contracted axis share a scale and a zero point, one of ``GROUP_SIZES``.
            None lets all weights of an output share them.
        symmetric: put every zero point in the middle of the codes, so that none has to be stored.
        method: ``rtn`` rounds to nearest. ``gptq`` is GPTQ (Frantar et al., arXiv 2210.17323) and needs calibration
            inputs.
        clip: search the range of least squared error instead of taking the largest weight.
        act_order: let GPTQ begin with the largest inputs.
        damping: what GPTQ adds to the diagonal of the Hessian, as a share of its mean.
        sweeps: how many rounds of coordinate descent follow GPTQ.
        follow: let GPTQ aim at what the original program would return, instead of at what this weight would return
            behind the layers that are quantized already.
        fisher: let tokens count in GPTQ by how much the predictions depend on them (:mod:`.calibration.curvature`). It
            takes a backward pass of every calibration input.
        group_bits: the widths of the groups, in their order, where they differ within the weight (mixed rows). Groups
            beyond its end have ``bits``.
        scales: of which dtype scales are numbers, so that a file can store two bytes for each. XNNPACK reads those of
            groups in ``bfloat16``. Scales beyond the range of ``float16`` stay as they are.

    Raises:
        ConfigError: a value out of range, one that would change nothing, or ``group_bits`` without a ``group_size``.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    method: Method = "gptq"
    clip: bool = True
    act_order: bool = False
    damping: float = 0.01
    sweeps: int = 1
    follow: bool = False
    fisher: bool = False
    group_bits: tuple[int, ...] | None = None
    scales: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        for bits in (self.bits, *(self.group_bits or ())):
            if bits not in WEIGHT_BITS:
                raise ConfigError(f"weights of {bits} bits: choose one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.group_bits is not None and self.group_size is None:
            raise ConfigError("group_bits are widths of groups: name their group_size")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))} or None")
        if self.method not in get_args(Method):
            raise ConfigError(f"method {self.method!r} is not one of {', '.join(get_args(Method))}")
        if self.scales not in get_args(ScaleDtype):
            raise ConfigError(f"scales {self.scales!r} is not one of {', '.join(get_args(ScaleDtype))}")
        unused = [name for name in ("act_order", "follow", "fisher") if getattr(self, name)]
        if unused and self.method == "rtn":
            raise ConfigError(f"{unused[0]}=True is GPTQ's, and method='rtn' rounds without it: leave one of them out")
        if not self.damping > 0:
            raise ConfigError(f"damping {self.damping} is not above 0")
        if self.sweeps < 0:
            raise ConfigError(f"{self.sweeps} sweeps: choose 0 or more")

    def of_group(self, group: int) -> Weights:
        """The scheme of one group by itself, which has its width as ``bits`` and no ``group_bits``."""
        if self.group_bits is None:
            return self
        return replace(self, bits=self.width_of(group), group_bits=None)

    def width_of(self, group: int) -> int:
        """The bits of one group."""
        listed = self.group_bits or ()
        return listed[group] if group < len(listed) else self.bits

    def widths(self, groups: int) -> tuple[int, tuple[int, ...] | None]:
        """The most bits of any of so many groups, and the bits of each, or None if all have as many."""
        each = tuple(map(self.width_of, range(groups)))
        return max(each), each if len(set(each)) > 1 else None


@dataclass(frozen=True)
class Activations:
    """How the inputs of linear layers are rounded: each token in its own range as it comes, or in a static range.

    Args:
        bits: the width of a code, 4 or 8.
        static: fix one range for a whole tensor on the calibration inputs.
        symmetric: put zero in the middle of the range. None does so for 8 bits per token only.
        calibration: how a static range is chosen. ``mse`` takes the range of least squared error, ``percentile`` that
            of ``percentile`` percent of the values, and ``minmax`` that of all of them.
        percentile: above 50 and at most 100.
        sinks: with ``mse`` and one range, scale tokens far above all others into it where that helps.
        clip: the share of each token's range that is covered, above 0 and at most 1. None takes the share of least
            error for 4 bits where there are calibration inputs, and all of the range otherwise.
        per_channel: fix a range for each channel of a tensor. The activations have to be static.
        massive: round tokens whose largest value is above so many times the median of all tokens' to 8 bits, in a range
            per token. They are few, the first of a text as a rule, and every other token reads them. None rounds all
            alike.

    Raises:
        ConfigError: a value out of range, one that would change nothing, or ``per_channel`` ranges not static.
    """

    bits: int = 8
    static: bool = False
    symmetric: bool | None = None
    calibration: Calibration = "mse"
    percentile: float = 99.99
    sinks: bool = True
    clip: float | None = None
    per_channel: bool = False
    massive: float | None = None

    def __post_init__(self) -> None:
        _check_massive(self.massive, self.bits, static=self.static)
        if self.per_channel and not self.static:
            raise ConfigError("activations per_channel need ranges that are known before: static=True")
        if self.bits not in (4, 8):
            raise ConfigError(f"activations of {self.bits} bits: choose 4 or 8")
        if self.calibration not in get_args(Calibration):
            raise ConfigError(f"calibration {self.calibration!r} is not one of {', '.join(get_args(Calibration))}")
        _check_clip(self.clip)
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile {self.percentile} is not above 50 and at most 100")
        if self.calibration != "mse" and not self.static:
            raise ConfigError(f"calibration={self.calibration!r} is of ranges that are fixed before: add static=True")
        if self.percentile != 99.99 and self.calibration != "percentile":
            raise ConfigError(f"percentile={self.percentile} changes nothing: add calibration='percentile'")

    @property
    def is_symmetric(self) -> bool:
        """Whether the range is symmetric; where ``symmetric`` is None, as decided by width and kind of range."""
        return (self.bits == 8 and not self.static) if self.symmetric is None else self.symmetric


@dataclass(frozen=True)
class Cache:
    """How keys and values of attention are rounded: each head of each token in a range of its own.

    Args:
        bits: the width of a code, 4 or 8.
        symmetric: put zero in the middle of the range.
        clip: as for :class:`Activations`.
        massive: likewise.

    Raises:
        ConfigError: a value out of range.
    """

    bits: int = 4
    symmetric: bool = False
    clip: float | None = None
    massive: float | None = None

    def __post_init__(self) -> None:
        _check_massive(self.massive, self.bits)
        if self.bits not in (4, 8):
            raise ConfigError(f"a KV cache of {self.bits} bits: choose 4 or 8")
        _check_clip(self.clip)


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize, and how. None leaves a part in the program's dtype.

    Args:
        weights: of the linear layers.
        activations: the inputs of the linear layers.
        cache: the keys and values of attention.
        head: the weights of the linear layers behind which there is no other. A parsed scheme rounds them to nearest.
        embedding: the tables that are looked up by token. They are rounded to nearest.
        overrides: by pattern of parameter names, the scheme for these weights. The first pattern that matches counts.
        exclude: patterns of parameter names whose linear layers keep their weights and inputs.
        average_bits: give every weight 2, 3, 4 or 8 bits by what it loses, so that they have this many on average.
        mixed_rows: let ``average_bits`` give every group of a weight's inputs its own width.
        stacks: round also stacks of matrices that are multiplied by as a whole, which ONNX Runtime has no product of
            integers for. Those of experts whose tokens are sorted are rounded in any case.
        learn: what is learned by what the original program returns, once all is rounded (:mod:`.learned`).

    Raises:
        ConfigError: a value out of range, or ``mixed_rows`` without ``average_bits`` or groups.
    """

    weights: Weights | None = field(default_factory=Weights)
    activations: Activations | None = None
    cache: Cache | None = None
    head: Weights | None = None
    embedding: Weights | None = None
    overrides: Mapping[str, Weights] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    average_bits: float | None = None
    mixed_rows: bool = False
    learn: Learning | None = None
    stacks: bool = True

    def __post_init__(self) -> None:
        least, most = min(WEIGHT_BITS), max(WEIGHT_BITS)
        if self.average_bits is not None and self.weights is None:
            raise ConfigError(
                f"{self.average_bits} bits on average are those of weights: say how to round them, weights=…"
            )
        if self.mixed_rows and (self.average_bits is None or self.weights is None or self.weights.group_size is None):
            raise ConfigError(
                "mixed rows are groups of several widths: name average_bits and a group_size, for example w3.5g64"
            )
        if self.learn is not None:
            check_kinds(self.learn.kinds)
        if self.average_bits is not None and not least <= self.average_bits <= most:
            raise ConfigError(f"{self.average_bits} bits on average: choose a number from {least} to {most}")

    @classmethod
    def parse(cls, text: str) -> QuantizationConfig:
        """The configuration that parts joined by ``-`` spell, for example ``w4g128-gptq-a8-kv4``, or a name that people
        know, for example ``w4a8``. The parts and names are those of :mod:`.spelling`; ``spinpass schemes`` lists them.

        Raises:
            ConfigError: a part it does not know, one that would change nothing or contradicts another, or a value out
                of range.
        """
        weights: dict[str, Any] = {}
        found: dict[str, Any] = {"weights": None}
        sinks = False
        for part in parts_of(text):
            if match := re.fullmatch(r"w(\d+)(\.\d+)?(?:g(\d+))?", part):
                if match[2]:
                    found["average_bits"] = float(match[1] + match[2])
                weights |= {"bits": 4 if match[2] else int(match[1]), "group_size": int(match[3]) if match[3] else None}
            elif part in ("rtn", "gptq"):
                weights["method"] = part
            elif part == "rows":
                found["mixed_rows"] = True
            elif match := re.fullmatch(r"(distill|learn)(\d*)", part):
                kinds, rounds = LEARNED[match[1]], int(match[2] or 1)
                if not rounds:
                    raise ConfigError(f"{part} in {text!r} is no round of learning: leave it out, or name 1 or more")
                found["learn"] = Learning(kinds, rounds=rounds)
            elif part in ("asym", "order"):
                weights |= {"symmetric": False} if part == "asym" else {"act_order": True}
            elif part == "fisher":
                weights["fisher"] = True
            elif part == "bf16":
                weights["scales"] = "bfloat16"
            elif match := re.fullmatch(r"a(\d+)(static|channel|asym)?", part):
                static, per_channel = match[2] in ("static", "channel"), match[2] == "channel"
                symmetric = False if match[2] == "asym" else None
                if symmetric is False and not Activations(int(match[1])).is_symmetric:
                    raise ConfigError(f"{part!r} in {text!r}: a{match[1]} has zero points already, leave 'asym' out")
                found["activations"] = Activations(int(match[1]), static, symmetric, per_channel=per_channel)
            elif match := re.fullmatch(r"kv(\d+)", part):
                found["cache"] = Cache(int(match[1]))
            elif part == "sinks":
                sinks = True
            elif match := re.fullmatch(r"(head|embed)(\d+)(?:g(\d+))?", part):
                role, group_size = "head" if match[1] == "head" else "embedding", int(match[3]) if match[3] else None
                found[role] = Weights(int(match[2]), group_size=group_size, method="rtn")
        if (weights or "learn" in found) and "bits" not in weights:
            raise ConfigError(f"{text!r} says how to round weights but not to how many bits: add a width such as w4")
        if sinks:
            few = {key: found[key] for key in ("activations", "cache") if key in found and found[key].bits < FINE}
            if not few or any(getattr(each, "static", False) for each in few.values()):
                raise ConfigError(
                    f"'sinks' in {text!r} is of a4 and kv4, with ranges of tokens: add one, or leave it out"
                )
            found |= {key: replace(each, massive=MASSIVE) for key, each in few.items()}
        return replace(cls(), **found | ({"weights": Weights(**weights)} if weights else {}))

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`~spinpass.quantization.quantize` needs calibration inputs."""
        static = self.activations is not None and self.activations.static
        massive = any(each is not None and each.massive is not None for each in (self.activations, self.cache))
        asked = static or massive or self.average_bits is not None or self.learn is not None
        return asked or any(w.method == "gptq" for w in self._layers())

    @property
    def uses_calibration(self) -> bool:
        """Whether calibration inputs change what :func:`~spinpass.quantization.quantize` does: where it needs them, and
        for clipped ranges of 4 bits."""
        clipped = [each for each in (self.activations, self.cache) if each is not None and each.bits < FINE]
        return self.needs_calibration or any(each.clip is None for each in clipped)

    @property
    def follows(self) -> bool:
        """Whether any weight is aimed at what the original program returns."""
        return any(w.follow and w.method == "gptq" for w in self._layers())

    @property
    def weighs_tokens(self) -> bool:
        """Whether any weight is rounded with tokens that count unlike, which takes a backward pass of each input."""
        return any(w.fisher for w in self._layers())

    def _layers(self) -> list[Weights]:
        return [w for w in (self.weights, *self.overrides.values()) if w is not None]

    def weights_of(self, fqn: str, *, head: bool) -> Weights | None:
        """How the weight ``fqn`` of a linear layer, which may be a head, is quantized, or None if it is not."""
        if self.excludes(fqn):
            return None
        chosen = self._named(fqn)
        return chosen or (self.head if head else self.weights)

    def table_of(self, fqn: str) -> Weights | None:
        """How the table ``fqn`` that is looked up by token is quantized, or None if it is not."""
        return None if self.excludes(fqn) else self._named(fqn) or self.embedding

    def names(self, fqn: str) -> bool:
        """Whether ``overrides`` say how a parameter is quantized."""
        return self._named(fqn) is not None

    def _named(self, fqn: str) -> Weights | None:
        return next((w for pattern, w in self.overrides.items() if fnmatchcase(fqn, pattern)), None)

    def check_used(self, parameters: Collection[str]) -> None:
        """Make sure that every pattern says something of a parameter that can be rounded.

        Raises ConfigError where one matches none, and tells the nearest name, or where others say all that it does.
        """
        for pattern in (*self.overrides, *self.exclude):
            if not any(fnmatchcase(fqn, pattern) for fqn in parameters):
                near = nearest_name(pattern, parameters)
                raise ConfigError(f"{pattern!r} is no linear layer or table of this program that can be rounded{near}")
        first = {fqn: next((p for p in self.overrides if fnmatchcase(fqn, p)), None) for fqn in parameters}
        used = {pattern for fqn, pattern in first.items() if not self.excludes(fqn)}
        unused = [pattern for pattern in self.overrides if pattern not in used]
        if unused:
            raise ConfigError(
                f"the scheme for {unused[0]!r} changes nothing: all that it matches is kept, or named by a pattern "
                "before it"
            )

    def excludes(self, fqn: str) -> bool:
        """Whether the name of a parameter matches a pattern of ``exclude``."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.exclude)


def _check_massive(massive: float | None, bits: int, *, static: bool = False) -> None:
    if massive is not None and not 1 < massive < math.inf:
        raise ConfigError(f"massive={massive} times the median of tokens: choose more than 1")
    if massive is not None and (bits == 8 or static):
        raise ConfigError("massive tokens are told apart where ranges are of tokens and have less than 8 bits")


def _check_clip(clip: float | None) -> None:
    if clip is not None and not 0 < clip <= 1:
        raise ConfigError(f"clip {clip} is not above 0 and at most 1")
