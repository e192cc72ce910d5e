"""Layouts of a checkpoint: how weights lie in the files of a folder, and what may be asked of each.

| layout | weights | online rotations |
|---|---|---|
| ``transformers`` | floats, under the names and in the shapes of the model | none |
| ``gptq`` | integers | none |
| ``compressed-tensors`` | floats or integers | Hadamards, which ``transform_config`` declares |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import SHIPPED_TEXT, check_windows, needs_text
from spinpass.formats import write_compressed_tensors, write_gptq, write_shards
from spinpass.graph import storage_key
from spinpass.passes import OnlineTransform
from spinpass.quantization import QuantizationConfig, QuantizedWeight

from .card import plural
from .gptq import check_offline, check_weights_alone, is_online
from .result import Result

CheckpointLayout = Literal["transformers", "gptq", "compressed-tensors"]
_NOTHING_DECLARED = (
    "nothing is quantized, and nothing is rotated online: leave out --layout compressed-tensors, or add --quantize or "
    "R4 to --rotations"
)


@dataclass(frozen=True)
class CheckpointReport:
    """What was written: the folder, its files of weights and their bytes, what was untied, and the
    ``quantization_config`` of its configuration, None where it has none. ``layout`` says more of it. ``floats`` are,
    beside integers, the names of matrices that stay in floats, and their bytes."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    untied: bool
    quantization: Mapping[str, Any] | None = None
    layout: str = ""
    floats: Mapping[str, int] = field(default_factory=dict)

    @property
    def left(self) -> str:
        """Say which matrices are floats beside the integers; empty where there are no integers or no such matrices."""
        if not self.floats:
            return ""
        first, *others = sorted(self.floats, key=lambda name: -self.floats[name])
        size = f"{sum(self.floats.values()) / 1e6:.1f} of {self.bytes / 1e6:.1f} MB"
        more = f" and {plural(len(others), 'other')}" if others else ""
        return f"{size} stay in floats: {first}{more} (loaders read no integers of tables, heads and experts; --keep)"

    @property
    def summary(self) -> str:
        """Say it in one line."""
        size = self.layout or f"checkpoint of {self.bytes / 1e6:.1f} MB in {plural(len(self.files), 'file')}"
        return f"{size}; its head shared the token table, and has one of its own now" if self.untied else size


@dataclass(frozen=True)
class CheckpointRequest:
    """The arguments of :func:`.checkpoint.rotate_checkpoint` that depend on each other.

    Raises ConfigError for a combination that means nothing.
    """

    config: RotationConfig
    quantize: str = ""
    layout: CheckpointLayout | None = None
    calibration: str | Path | None = None
    windows: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in (None, *get_args(CheckpointLayout)):
            raise ConfigError(f"layout={self.layout!r} is not one of {', '.join(get_args(CheckpointLayout))}")
        if self.written != "compressed-tensors":
            check_offline(self.config)
        scheme = self.scheme
        if scheme is None:
            self._check_floats()
        else:
            if self.written == "transformers":
                raise ConfigError(
                    "--layout transformers holds floats: leave out --quantize, or choose --layout gptq or "
                    "compressed-tensors"
                )
            check_weights_alone(scheme, self.written)
            if self.calibration is None and needs_text(scheme):
                object.__setattr__(self, "calibration", SHIPPED_TEXT)
            if self.calibration is not None and not scheme.uses_calibration:
                raise ConfigError(f"{self.quantize} rounds without a text: leave out --calibration, or use -gptq")
        check_windows(self.windows, self.calibration)

    def _check_floats(self) -> None:
        if self.layout == "gptq":
            raise ConfigError("--layout gptq holds integers: add --quantize, for example w4g128-gptq")
        if self.layout == "compressed-tensors" and not is_online(self.config):
            raise ConfigError(_NOTHING_DECLARED)
        if self.calibration is not None or self.keep:
            raise ConfigError("--calibration and --keep are of weights that are quantized: add --quantize")

    @property
    def written(self) -> CheckpointLayout:
        """The layout that is written."""
        return self.layout or ("gptq" if self.quantize else "transformers")

    @property
    def scheme(self) -> QuantizationConfig | None:
        """How weights are rounded; None where they are not."""
        if not self.quantize:
            return None
        return replace(QuantizationConfig.parse(self.quantize), exclude=self.keep)


def write_layout(
    folder: Path, layout: CheckpointLayout, result: Result, transforms: Sequence[OnlineTransform]
) -> CheckpointReport:
    """Write the weights of a result into a folder, as a layout has them.

    Raises ConfigError where the layout cannot hold one, ExportError where the folder is not writable.
    """
    weights = {} if result.quantization is None else result.quantization.weights
    tensors = _floats(result.program.state_dict, weights)
    if layout == "transformers":
        files = write_shards(folder, tensors)
        return CheckpointReport(folder, files, sum(path.stat().st_size for path in files), False)
    if layout == "gptq":
        gptq = write_gptq(folder, weights, tensors=tensors)
        return CheckpointReport(folder, gptq.files, gptq.bytes, False, gptq.config, gptq.summary, _matrices(tensors))
    if not weights and not transforms:
        raise ConfigError(_NOTHING_DECLARED)
    dtypes = {result.program.state_dict[name].dtype for name in weights} or {torch.float32}
    if len(dtypes) > 1:
        raise ConfigError(f"weights are of {' and '.join(sorted(map(str, dtypes)))}: choose one, --dtype float32")
    (dtype,) = dtypes
    made = write_compressed_tensors(folder, weights, transforms, tensors=tensors, scales_dtype=dtype)
    left = _matrices(tensors) if weights else {}
    return CheckpointReport(folder, made.files, made.bytes, False, made.config, made.summary, left)


def _matrices(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of every matrix, and of every stack of matrices, by name."""
    return {name: tensor.nbytes for name, tensor in tensors.items() if tensor.ndim > 1}


def _floats(tensors: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Return every constant that is no integers under the first of its names: transformers ties the others to it.

    Raises ConfigError where one name of a constant is quantized and another is not.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(storage_key(tensor), []).append(name)
    found = {}
    for first, *others in names.values():
        packed = [name for name in (first, *others) if name in weights]
        if packed and others:
            other = next(name for name in (first, *others) if name != packed[0])
            raise ConfigError(
                f"{packed[0]} is quantized, and shares its values with {other}: leave head… and embed… out of "
                "--quantize, or rotate R1 with --tied untie"
            )
        if not packed:
            found[first] = tensors[first]
    return found
