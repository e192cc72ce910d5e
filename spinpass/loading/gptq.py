"""A folder of transformers whose weights are a GPTQ checkpoint: its model with the checkpoint's values as floats.

transformers builds the model from the configuration; the values come from the integers, without any kernel package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.formats import read_gptq

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


def with_values(program: ExportedProgram, folder: str) -> ExportedProgram:
    """Return ``program``, which is the skeleton's, with the checkpoint's values.

    Raises ConfigError and ExportError where :func:`spinpass.formats.read_gptq` or :func:`.dequantize_checkpoint` does.
    """
    return dequantize_checkpoint(program, read_gptq(folder))
