"""Building a tiny random model of any causal language model type, and inputs for it."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from .overrides import OVERRIDES, SWITCHES
from .shrink import VOCAB, tiny_settings

BATCH, SEQUENCE = 3, 11  # prime to every tiny size, so that no axis agrees with another by accident
VOCABULARY = 120  # the ids that texts are made of are below this
_SEED = 0
_MOST_PARAMETERS = 60_000_000
# Parameters whose default values carry meaning (decays, time steps): disturbed, not replaced.
_MEANINGFUL = re.compile(r"A_log|\bD\b|time_|dt_|decay|slope")
_BUFFERS_LEFT_ALONE = re.compile(r"inv_freq|running_|num_batches")


def model_types(*, switches: bool = True) -> list[str]:
    """Every causal language model type of the installed transformers; ``type@switch`` after them."""
    from transformers.models.auto import modeling_auto

    return [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(SWITCHES if switches else ())]


def build(
    arch: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, experts: str | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of the type, every parameter random, in eval mode and without cache; and inputs for it.

    ``attention`` and ``experts`` choose transformers' implementation of either. Raises KeyError for an unknown type;
    whatever the model's own constructor raises passes through.
    """
    torch.manual_seed(_SEED)
    model_class, config_class = _classes(arch)
    settings = tiny_settings(config_class, _own_settings(arch, config_class), OVERRIDES)
    model: Any = model_class(config_class(**settings, attn_implementation=attention)).eval()
    if experts is not None:
        model.set_experts_implementation(experts)
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{arch}: {count / 1e6:.0f}M parameters are not tiny; add an override")
    randomise(model)
    set_cache(model, False)
    return model.to(dtype), sample_inputs(model)


def set_cache(model: Any, on: bool) -> None:
    """Whether forward and generate return a cache."""
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = on


def sample_inputs(model: Any, *, batch: int = BATCH, sequence: int = SEQUENCE, seed: int = 1) -> dict[str, Tensor]:
    """Token ids and, where the model takes one, a mask that pads the second row on the right."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    rows = batch
    if type(model).__name__.startswith("Musicgen"):  # one row per codebook
        rows *= getattr(config, "num_codebooks", 1)
    words = min(getattr(config, "vocab_size", VOCAB), VOCABULARY)
    inputs = {"input_ids": torch.randint(3, words, (rows, sequence), generator=generator)}
    if "attention_mask" in inspect.signature(type(model).forward).parameters:
        mask = torch.ones(batch, sequence, dtype=torch.long)
        mask[1, -3:] = 0
        inputs["attention_mask"] = mask
    return inputs


def randomise(model: nn.Module, seed: int = _SEED) -> nn.Module:
    """Give every parameter, and every float buffer that is saved, a value that a wrong fold cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.copy_(_random_value(name, p.float(), owners[id(p)], _normal(p, generator)))
        saved = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name not in saved or not buffer.is_floating_point() or _BUFFERS_LEFT_ALONE.search(name):
                continue
            if bool(torch.isfinite(buffer).all()):
                buffer.add_(0.1 * _normal(buffer, generator))
    return model


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)


def _random_value(name: str, old: Tensor, owner: nn.Module, z: Tensor) -> Tensor:
    """Biases 0.1 z around a constant; scales c (1 + 0.3 z), or 0.3 z for the (1 + w) kind; tables z; matrices
    z/√fan_in; the rest near what it was."""
    level = float(old.flatten()[0]) if old.numel() else 0.0
    constant = bool((old == level).all())
    if name.endswith(("bias", "_bias")):
        return 0.1 * z + (level if constant else 0.0)
    if old.ndim <= 1 and constant:
        return 0.3 * z if level == 0 else level * (1 + 0.3 * z)
    if isinstance(owner, nn.Embedding):
        if owner.padding_idx is not None:
            z[owner.padding_idx] = 0.1
        return z
    if old.ndim <= 1:
        return old + 0.1 * z
    if _MEANINGFUL.search(name):
        spread = float(old.std()) if old.numel() > 1 else 0.0
        return old + 0.1 * (spread if spread > 0 else 1.0) * z
    return z / math.sqrt(max(1, _fan_in(old, owner)))


def _fan_in(weight: Tensor, owner: nn.Module) -> int:
    kind = type(owner).__name__
    if kind == "Conv1D":  # transformers' linear with a transposed weight
        return weight.shape[0]
    return math.prod(weight.shape[1:]) if "conv" in kind.lower() else weight.shape[-1]


def _classes(arch: str) -> tuple[Any, Any]:
    """Model and configuration class that AutoModelForCausalLM would use."""
    import transformers
    from transformers.models.auto import modeling_auto

    name: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_type(arch)]
    model_class = getattr(transformers, name[0] if isinstance(name, (tuple, list)) else name)
    config_class = transformers.CONFIG_MAPPING[_type(arch)]
    wanted = getattr(model_class, "config_class", None)
    text_only = wanted is not None and not issubclass(config_class, wanted)  # the text part of a composite model
    return model_class, wanted if text_only else config_class


def _own_settings(arch: str, config_class: Any) -> dict[str, Any]:
    own_type = getattr(config_class, "model_type", _type(arch))
    return {**OVERRIDES.get(own_type, {}), **OVERRIDES.get(_type(arch), {}), **SWITCHES.get(arch, {})}


def _type(arch: str) -> str:
    return arch.split("@")[0]
