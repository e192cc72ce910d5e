"""What the zoo makes of a type: the prefill program, the one with a KV cache in and out, other dtypes, images.

The variant ``folder`` is no program: it is made by the product itself, see :mod:`.folder`."""

from __future__ import annotations

import copy
import time
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import vision
from .export import Exported, NotExported, export, first_line, prefill_and_decode
from .models import build

Variant = Literal["prefill", "decode", "bf16", "fp16", "decomposed", "vision", "folder"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NotBuilt(Exception):
    """The tiny model could not be built or run."""


def export_variant(arch: str, variant: Variant) -> Exported:
    """Build the type's tiny model and export it. Raises NotBuilt or NotExported, caused by the original error."""
    model, inputs = _built(arch, variant)
    if variant == "decode":
        model, inputs = _with_cache(model)
        return export(model, inputs, ways=("dynamic",))
    exported = export(model, inputs)
    return _decomposed(exported) if variant == "decomposed" else exported


def _built(arch: str, variant: Variant) -> tuple[nn.Module, dict[str, Tensor]]:
    try:
        if variant == "vision":
            return vision.build(arch)
        model, inputs = build(arch, dtype=_DTYPES.get(variant, torch.float32))
        with torch.no_grad():  # once before tracing: some rescale their weights in the first call
            model(**copy.deepcopy(inputs))
    except Exception as error:  # a model's constructor and forward raise what they like
        raise NotBuilt(first_line(error)) from error
    return model, inputs


def _with_cache(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the inputs of its decoding step, which bring the cache."""
    from transformers.exporters.exporter_dynamo import is_cache_object

    try:
        _, inputs = prefill_and_decode(model)
    except Exception as error:  # generate() raises what it likes
        raise NotExported(f"generate: {first_line(error.__cause__ or error)}") from error
    if not any(is_cache_object(v) for v in inputs.values()):
        raise NotExported("generate: the decoding step takes no cache")
    dropped = ("return_dict", "next_sequence_length")
    return model, {k: v for k, v in inputs.items() if k not in dropped} | {"use_cache": True}


def _decomposed(exported: Exported) -> Exported:
    started = time.perf_counter()
    program = exported.program.run_decompositions()
    return Exported(program, exported.way, exported.seconds + time.perf_counter() - started, exported.failures)
