"""OpenVINO models on a CPU, in the precision they were written in, with errors that say what failed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import check_opened

_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "boolean": torch.bool,
}


def import_openvino() -> Any:
    """The package ``openvino``.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ExportError(f"this needs the package {error.name}: pip install 'spinpass[openvino]'") from error
    return openvino


class CompiledModel:
    """A model file compiled for the CPU at float32, where OpenVINO's own choice may be less precise.

    Args:
        path: of the file.
        threads: how many of the CPU. None leaves the number to OpenVINO.
        rounds: let OpenVINO round what it multiplies by integer weights to 8 bits, in groups, as it does by default.

    Attributes:
        inputs: the names of the inputs.
        shapes: their shapes, None for dynamic axes.
        dtypes: their dtypes, None for those that torch does not have.
        outputs: the names of the outputs.

    Raises:
        ExportError: OpenVINO is missing or cannot load the file.
        VerificationError: the file, or its weights, are not those that ``spinpass.json`` beside it lists.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, rounds: bool = False) -> None:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if not rounds:
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        openvino = import_openvino()
        check_opened(Path(path))
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError and its subclasses, and TypeError for options
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot load {Path(path).name}: {openvino_reason(error)}"
            ) from error
        self._request = self._model.create_infer_request()
        self.inputs = tuple(port.get_any_name() for port in self._model.inputs)
        self.shapes = tuple(_shape(port.get_partial_shape()) for port in self._model.inputs)
        self.dtypes = tuple(_DTYPES.get(port.get_element_type().get_type_name()) for port in self._model.inputs)
        self.outputs = tuple(port.get_any_name() for port in self._model.outputs)

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """All outputs for one value per input, in order.

        Raises:
            ExportError: OpenVINO fails.
        """
        feed = {i: value.detach().cpu().contiguous().numpy() for i, value in enumerate(values)}
        try:
            results = self._request.infer(feed, share_inputs=False, share_outputs=False)
        except Exception as error:  # see __init__
            raise ExportError(f"OpenVINO cannot run the model: {openvino_reason(error)}") from error
        return [torch.from_numpy(results[port]) for port in self._model.outputs]


def _shape(partial: Any) -> tuple[int | None, ...]:
    """The sizes of the axes, None for a dynamic one."""
    return tuple(None if size.is_dynamic else size.get_length() for size in partial)


def generate_openvino(
    model: CompiledModel, ids: Sequence[int], max_new_tokens: int, *, end: Collection[int] = ()
) -> list[int]:
    """Continue ``ids`` greedily with a model that takes tokens and a cache and returns logits and the cache; the new
    tokens, an end token included.

    A cache is what has three axes or more; its dynamic axes but the first grow, and its outputs come in the order of
    its inputs. Raises ConfigError for an empty prompt, a limit below 1, or a model without a cache that grows.
    """
    if not ids or max_new_tokens < 1:
        raise ConfigError(f"there are {len(ids)} tokens to start from and {max_new_tokens} to make: give at least one")
    cache = [torch.zeros(_empty(shape), device="cpu") for shape in model.shapes if len(shape) >= 3]
    if not cache or any(t.numel() for t in cache) or len(cache) + 1 != len(model.outputs):
        raise ConfigError(
            f"a model that takes {', '.join(model.inputs)} and returns {', '.join(model.outputs)} cannot generate: "
            "export the graph that decodes, with a cache of dynamic length as inputs and outputs"
        )
    tokens: list[int] = []
    given, length = list(ids), len(ids)
    while True:
        positions = torch.arange(length - len(given), length, device="cpu")
        known = {
            "position_ids": positions[None],
            "cache_position": positions,
            "attention_mask": torch.ones(1, length, device="cpu").long(),
        }
        rest = iter(cache)
        fed = [
            next(rest) if len(shape) >= 3 else known.get(name, torch.tensor([given], device="cpu"))
            for name, shape in zip(model.inputs, model.shapes)
        ]
        logits, *cache = model.run(fed)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in end or len(tokens) == max_new_tokens:
            return tokens
        given, length = tokens[-1:], length + 1


def _empty(shape: Sequence[int | None]) -> list[int]:
    """The shape of a cache for a batch of 1 without tokens."""
    return [(1 if axis == 0 else 0) if size is None else size for axis, size in enumerate(shape)]


def openvino_reason(error: BaseException) -> str:
    """What OpenVINO says at the end of its long messages: the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
