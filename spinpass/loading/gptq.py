"""A folder of transformers whose weights are a checkpoint of integers: its model with their values as floats.

transformers builds the model from the configuration; the values come from the integers, without any kernel package. So
do the online transforms that a checkpoint of compressed-tensors declares: they stand in the program as Hadamards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.formats import (
    declared_transforms,
    is_transform,
    read_compressed_tensors,
    read_gptq,
    read_object,
    read_tensors,
    resolved_transforms,
)
from spinpass.passes import OnlineTransform, transform_places, with_online_transforms

from .dequantize import dequantize_checkpoint


def skeleton(transformers: Any, folder: str, dtype: Any) -> Any:
    """Build the model that config.json describes, its values still to come. Raises whatever transformers raises."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=None if dtype == "auto" else dtype).eval()
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def with_values(program: ExportedProgram, folder: str, method: str) -> ExportedProgram:
    """Return ``program``, which is the skeleton's, with the checkpoint's values and online transforms.

    Raises ConfigError and ExportError where the reader of the method, :func:`spinpass.formats.resolved_transforms` or
    :func:`.dequantize_checkpoint` does.
    """
    if method == "gptq":
        return dequantize_checkpoint(program, read_gptq(folder))
    checkpoint = read_compressed_tensors(folder)
    matrices = _matrices(program, checkpoint.tensors)
    transforms = resolved_transforms(checkpoint.transforms, transform_places(program), matrices)
    rest = {name: t for name, t in checkpoint.tensors.items() if name not in matrices}
    return with_online_transforms(dequantize_checkpoint(program, replace(checkpoint, tensors=rest)), transforms)


def declared_online(folder: str | Path, program: ExportedProgram) -> tuple[OnlineTransform, ...]:
    """Return the online transforms that a folder of compressed-tensors declares for a program of its model.

    No integers are unpacked. Raises ConfigError and ExportError as :func:`spinpass.formats.resolved_transforms` and
    :func:`spinpass.formats.read_tensors` do.
    """
    entry = read_object(Path(folder) / "config.json").get("quantization_config") or {}
    declared = declared_transforms(entry.get("transform_config") or {})
    return resolved_transforms(declared, transform_places(program), _matrices(program, read_tensors(Path(folder))))


def _matrices(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are matrices of transforms, and no parameters."""
    return {name: t for name, t in tensors.items() if is_transform(name) and name not in program.state_dict}
