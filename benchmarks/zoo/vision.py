"""Image-text-to-text types: a tiny random model, text with an image in it, and one program that takes both.

The tower is narrower than the text decoder, so that no space of the one can be taken for one of the other. Each row of
the batch has one image (or as many tiles or frames as the type wants), whose placeholder tokens stand in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .models import randomise, set_cache
from .overrides import OVERRIDES
from .shrink import HIDDEN, VOCAB, tiny_rope, tiny_settings
from .vision_inputs import IMAGE_TOKEN, IMAGES, WHOLE, image_text_inputs
from .vision_overrides import NOT_EXPORTABLE, SETTINGS

TOWER_HIDDEN, TOWER_FF, TOWER_HEADS = 32, 48, 4
_MOST_PARAMETERS = 60_000_000
_TOWER = re.compile(r"vision|vit|image|vq")
_TOKEN = re.compile(r"^(image|video|audio|vision|boi|eoi|boa|eoa)\w*token(_id|_index)$")
# Field of a tower's configuration -> its tiny value; applied where the field is there and set.
_TOWER_SIZES: dict[str, Any] = dict(
    hidden_size=TOWER_HIDDEN, embed_dim=TOWER_HIDDEN, intermediate_size=TOWER_FF, mlp_dim=TOWER_FF,
    num_key_value_heads=TOWER_HEADS, head_dim=TOWER_HIDDEN // TOWER_HEADS, image_size=32, patch_size=8,
    patch_embed_hidden_size=3 * 8 * 8, window_size=16, num_position_embeddings=36, output_channels=16,
    global_attn_indexes=[1], fullatt_block_indexes=[1], deepstack_visual_indexes=[0, 1],
    out_hidden_size=HIDDEN, text_hidden_size=HIDDEN, projection_dim=HIDDEN,
)  # fmt: skip
_MROPE = [2, 3, 3]  # of heads of 16


def image_text_types() -> list[str]:
    """Every image-text-to-text type of the installed transformers."""
    from transformers.models.auto import modeling_auto

    return list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(arch: str, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of the type, every parameter random, in eval mode and without cache; and text and images for it.

    Raises KeyError for an unknown type, and for one that takes no images or wants what is not here; whatever the
    model's own constructor raises passes through.
    """
    if arch not in IMAGES and arch not in WHOLE:
        raise KeyError(f"{arch}: {NOT_EXPORTABLE.get(arch, 'no image-text type')}")
    torch.manual_seed(0)
    model_class, config_class = _classes(arch)
    own = _with_tower({**OVERRIDES.get(arch, {}), **SETTINGS.get(arch, {})}, config_class)
    model: Any = model_class(config_class(**tiny_settings(config_class, own, OVERRIDES))).eval()
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{arch}: {count / 1e6:.0f}M parameters are not tiny; add an override")
    _randomise_kernels(randomise(model))
    set_cache(model, False)
    return model.to(dtype), image_text_inputs(arch, model)


def _randomise_kernels(model: nn.Module) -> None:
    """Patch embeddings and convolutional necks large enough for the image to matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                fan_in = math.prod(module.weight.shape[1:])
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / math.sqrt(fan_in))


def _classes(arch: str) -> tuple[Any, Any]:
    import transformers
    from transformers.models.auto import modeling_auto

    name: Any = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[arch]
    model_class = getattr(transformers, name[0] if isinstance(name, (tuple, list)) else name)
    return model_class, getattr(model_class, "config_class", None) or transformers.CONFIG_MAPPING[arch]


def _with_tower(own: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """``own`` and, under it, tiny towers, token ids inside the vocabulary and m-RoPE sections that fit the heads."""
    try:
        default = config_class()
    except Exception:  # some have no valid default: the overrides say what they need
        default = config_class(**{k: v for k, v in own.items() if not isinstance(v, Mapping)})
    settings = _token_ids(default) | dict(own)
    for name, sub in vars(default).items():
        if not hasattr(sub, "to_dict"):
            continue
        made = _tower(vars(sub)) if _TOWER.search(name) else _mrope(vars(sub))
        settings[name] = made | dict(own.get(name, {}))
    return settings


def _token_ids(config: Any) -> dict[str, int]:
    names = [n for n, v in vars(config).items() if _TOKEN.match(n) and isinstance(v, int)]
    others = iter(range(IMAGE_TOKEN + 1, VOCAB))
    return {n: IMAGE_TOKEN if re.match(r"image_token(_id|_index)$", n) else next(others) for n in names}


def _tower(fields: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for name, size in _TOWER_SIZES.items():
        old = fields.get(name)
        if old is not None:
            made[name] = (
                type(old)([size] * len(old)) if isinstance(old, (list, tuple)) and isinstance(size, int) else size
            )
    return made


def _mrope(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) or len(rope.get("mrope_section", ())) != 3:
        return {}
    return {"rope_parameters": tiny_rope(rope) | {"mrope_section": _MROPE}}
