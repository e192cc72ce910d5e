"""A folder of transformers whose weights are a checkpoint of integers: its model with their values as floats.

transformers builds the model from the configuration; the values come from the integers, without any kernel package. So
do the online transforms that a checkpoint of compressed-tensors declares: they stand in the program as Hadamards.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.formats import is_transform, read_compressed_tensors, read_gptq, resolved_transforms
from spinpass.passes import transform_places, with_online_transforms

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
    matrices = {
        name: t for name, t in checkpoint.tensors.items() if is_transform(name) and name not in program.state_dict
    }
    transforms = resolved_transforms(checkpoint.transforms, transform_places(program), matrices)
    rest = {name: t for name, t in checkpoint.tensors.items() if name not in matrices}
    return with_online_transforms(dequantize_checkpoint(program, replace(checkpoint, tensors=rest)), transforms)
