"""What to quantize and how: values that check themselves, and a short spelling of them, ``w4g128-gptq-a8-kv4``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from spinpass.errors import ConfigError

Method = Literal["rtn", "gptq"]
Calibration = Literal["mse", "percentile", "minmax"]
WEIGHT_BITS, GROUP_SIZES = (2, 3, 4, 8), (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Weights:
    """Of linear layers: integers of ``bits`` bits with a scale (and a zero point, unless ``symmetric``) for every
    ``group_size`` weights along the contracted axis, or for all of them where that is None.

    ``method``: round to nearest, or GPTQ (arXiv 2210.17323), which needs calibration inputs; ``clip`` searches the
    range of least squared error instead of taking the largest weight; ``act_order`` lets GPTQ begin with the
    largest inputs; ``damping`` is its share of the mean diagonal of the Hessian. After it come ``sweeps`` rounds of
    coordinate descent; ``follow`` aims at what the unquantized program would return, instead of at what this weight
    would return behind the layers that are quantized already. ``group_bits``: widths of the groups, in their order,
    where they differ within the weight (mixed-bit rows); ``bits`` is then what groups have that are not named.
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
    group_bits: tuple[int, ...] | None = None

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
        if not self.damping > 0:
            raise ConfigError(f"damping {self.damping} is not above 0")
        if self.sweeps < 0:
            raise ConfigError(f"{self.sweeps} sweeps: choose 0 or more")

    def of_group(self, group: int) -> Weights:
        """How one group is rounded: without ``group_bits``, by the width that it has there."""
        if self.group_bits is None:
            return self
        return replace(self, bits=self.width_of(group), group_bits=None)

    def width_of(self, group: int) -> int:
        """Bits of one group."""
        listed = self.group_bits or ()
        return listed[group] if group < len(listed) else self.bits

    def widths(self, groups: int) -> tuple[int, tuple[int, ...] | None]:
        """The most bits that a group has, and those of every group unless they all have as many."""
        each = tuple(map(self.width_of, range(groups)))
        return max(each), each if len(set(each)) > 1 else None


@dataclass(frozen=True)
class Activations:
    """The inputs of linear layers: per token as they come, or ``static``, with one range for a whole tensor, or for
    each channel of it (``per_channel``, which is static), chosen on the calibration inputs by ``calibration``: that of
    least squared error (``mse``), of ``percentile`` percent of the values, or of all of them (``minmax``). ``sinks``:
    with ``mse`` and one range, tokens far above all others are scaled into it, where that helps. ``symmetric``: None is
    symmetric for 8 bits per token and asymmetric otherwise.
    ``clip``: the share of each token's range that is covered; None is that of least error on the calibration inputs for
    4 bits, where there are any, and all of it otherwise.
    """

    bits: int = 8
    static: bool = False
    symmetric: bool | None = None
    calibration: Calibration = "mse"
    percentile: float = 99.99
    sinks: bool = True
    clip: float | None = None
    per_channel: bool = False

    def __post_init__(self) -> None:
        if self.per_channel and not self.static:
            raise ConfigError("activations per_channel need ranges that are known before: static=True")
        if self.bits not in (4, 8):
            raise ConfigError(f"activations of {self.bits} bits: choose 4 or 8")
        if self.calibration not in get_args(Calibration):
            raise ConfigError(f"calibration {self.calibration!r} is not one of {', '.join(get_args(Calibration))}")
        _check_clip(self.clip)
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile {self.percentile} is not above 50 and at most 100")

    @property
    def is_symmetric(self) -> bool:
        """``symmetric``, decided."""
        return (self.bits == 8 and not self.static) if self.symmetric is None else self.symmetric


@dataclass(frozen=True)
class Cache:
    """Keys and values of attention, per head and token; ``clip`` as for :class:`Activations`."""

    bits: int = 4
    symmetric: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"a KV cache of {self.bits} bits: choose 4 or 8")
        _check_clip(self.clip)


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize; None leaves it in the program's dtype.

    ``head``: the linear layers behind which there is no other, ``embedding``: tables looked up by token, both rounded
    to nearest. ``overrides``: pattern of parameter names -> weights; the first that matches counts. ``exclude``:
    patterns of parameter names whose linear layers stay as they are, weights and inputs. ``average_bits``: give the
    weights 2, 3, 4 or 8 bits each, by what each loses, so that they have this many on average; with ``mixed_rows`` to
    every group of a weight's inputs by itself. ``distill``: how many times to go through the calibration inputs to
    train the scales of the weights by what the unquantized program returns (:mod:`.packed.distill`).
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
    distill: int = 0

    def __post_init__(self) -> None:
        least, most = min(WEIGHT_BITS), max(WEIGHT_BITS)
        if self.mixed_rows and (self.average_bits is None or self.weights is None or self.weights.group_size is None):
            raise ConfigError(
                "mixed rows are groups of several widths: name average_bits and a group_size, w3.5g64 say"
            )
        if self.distill < 0:
            raise ConfigError(f"{self.distill} rounds of distillation: choose 0 or more")
        if self.average_bits is not None and not least <= self.average_bits <= most:
            raise ConfigError(f"{self.average_bits} bits on average: choose a number from {least} to {most}")

    @classmethod
    def parse(cls, text: str) -> QuantizationConfig:
        """From parts joined by ``-``: ``w4`` ``w4g128`` (weights, perhaps in groups; ``w3.5``: mixed, on average),
        ``rows`` (mixed within weights too: ``w3.5g64-rows``), ``asym``, ``rtn`` or ``gptq`` (the default), ``order``,
        ``a8`` ``a8static`` ``a8channel`` (activations), ``kv4`` (cache), ``head8``, ``embed8``, ``distill`` or
        ``distill4`` (rounds).

        Raises ConfigError: a part it does not know, or a value out of range.
        """
        weights: dict[str, Any] = {}
        found: dict[str, Any] = {"weights": None}
        for part in text.lower().split("-"):
            if match := re.fullmatch(r"w(\d+)(\.\d+)?(?:g(\d+))?", part):
                if match[2]:
                    found["average_bits"] = float(match[1] + match[2])
                weights |= {"bits": 4 if match[2] else int(match[1]), "group_size": int(match[3]) if match[3] else None}
            elif part in ("rtn", "gptq"):
                weights["method"] = part
            elif part == "rows":
                found["mixed_rows"] = True
            elif match := re.fullmatch(r"distill(\d*)", part):
                found["distill"] = int(match[1] or 1)
            elif part in ("asym", "order"):
                weights |= {"symmetric": False} if part == "asym" else {"act_order": True}
            elif match := re.fullmatch(r"a(\d+)(static|channel)?", part):
                static, per_channel = match[2] is not None, match[2] == "channel"
                found["activations"] = Activations(int(match[1]), static, per_channel=per_channel)
            elif match := re.fullmatch(r"kv(\d+)", part):
                found["cache"] = Cache(int(match[1]))
            elif match := re.fullmatch(r"(head|embed)(\d+)", part):
                found["head" if match[1] == "head" else "embedding"] = Weights(int(match[2]), method="rtn")
            else:
                raise ConfigError(f"{part!r} in {text!r} is not a part of a scheme such as w4g128-gptq-a8-kv4")
        if weights and "bits" not in weights:
            raise ConfigError(f"{text!r} says how to round weights but not to how many bits: add w4, say")
        return replace(cls(), **found | ({"weights": Weights(**weights)} if weights else {}))

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`~spinpass.quantization.quantize` needs inputs."""
        static = self.activations is not None and self.activations.static
        asked = static or self.average_bits is not None or self.distill > 0
        return asked or any(w.method == "gptq" for w in self._layers())

    @property
    def follows(self) -> bool:
        """Whether any weight is aimed at what the unquantized program returns."""
        return any(w.follow and w.method == "gptq" for w in self._layers())

    def _layers(self) -> list[Weights]:
        return [w for w in (self.weights, *self.overrides.values()) if w is not None]

    def weights_of(self, fqn: str, *, head: bool) -> Weights | None:
        """How a linear layer's weight of this name is quantized, None if not at all."""
        if self.excludes(fqn):
            return None
        chosen = next((w for pattern, w in self.overrides.items() if fnmatchcase(fqn, pattern)), None)
        return chosen or (self.head if head else self.weights)

    def excludes(self, fqn: str) -> bool:
        """The name matches a pattern of ``exclude``."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.exclude)


def _check_clip(clip: float | None) -> None:
    if clip is not None and not 0 < clip <= 1:
        raise ConfigError(f"clip {clip} is not above 0 and at most 1")
