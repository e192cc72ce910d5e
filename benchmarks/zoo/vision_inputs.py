"""Images for a tiny model, and text with as many placeholder tokens as the model makes features of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

BATCH, TEXT = 2, 7
IMAGE, PATCH = 32, 8
GRID = IMAGE // PATCH
IMAGE_TOKEN = 149
_WORDS = (3, 120)


def image_text_inputs(arch: str, model: Any) -> Inputs:
    """Keyword arguments of the model's forward: text with images in it."""
    return WHOLE[arch](model) if arch in WHOLE else _with_placeholders(arch, model, IMAGES[arch](model))


def _with_placeholders(arch: str, model: Any, images: Inputs) -> Inputs:
    with torch.no_grad():
        count = _features(model, images)
    if count % BATCH:
        raise ValueError(f"{arch}: {count} features are not the same number for each of {BATCH} images")
    inputs = text(count // BATCH) | images
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    if "image_grid_thw" in inputs:
        inputs |= _precomputed(model, inputs, packed=arch not in _NOT_PACKED)
    return inputs


def text(images: int, before: int = 2) -> Inputs:
    """Token ids with ``images`` placeholders after the first ones, and a mask."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(*_WORDS, (BATCH, images + TEXT), generator=generator)
    ids[:, before : before + images] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0  # padding on the right: no row sees nothing
    return {"input_ids": ids, "attention_mask": mask}


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# -- images ------------------------------------------------------------------------------------------------------------


def one_image(model: Any) -> Inputs:
    return {"pixel_values": noise(BATCH, 3, IMAGE, IMAGE)}


def sized_image(model: Any) -> Inputs:
    return one_image(model) | {"image_sizes": torch.tensor([[IMAGE, IMAGE]] * BATCH)}


def tiles(count: int) -> Callable[[Any], Inputs]:
    return lambda model: {"pixel_values": noise(BATCH, count, 3, IMAGE, IMAGE)}


def sized_tiles(count: int, height: int = IMAGE, width: int = IMAGE) -> Callable[[Any], Inputs]:
    return lambda model: tiles(count)(model) | {"image_sizes": torch.tensor([[height, width]] * BATCH)}


def patches(model: Any) -> Inputs:
    """Packed patches of images whose sizes are given as a grid of patches."""
    tower = model.config.vision_config
    frames = getattr(tower, "temporal_patch_size", None) or getattr(tower, "patch_temporal", 1)
    grid = torch.tensor([[1, GRID, GRID]] * BATCH)
    return {
        "pixel_values": noise(int(grid.prod(-1).sum()), 3 * frames * PATCH * PATCH),
        "image_grid_thw": grid,
    }


def video(frames: int) -> Callable[[Any], Inputs]:
    return lambda model: {"pixel_values": noise(BATCH, frames, 3, IMAGE, IMAGE)}


def square_patches(model: Any) -> Inputs:
    """As :func:`patches`, each patch in its own three axes."""
    packed = patches(model)
    return packed | {"pixel_values": packed["pixel_values"].view(-1, 3, PATCH, PATCH)}


def padded_patches(model: Any) -> Inputs:
    """Patches of one image per row and the number of them along either axis."""
    return {
        "pixel_values": noise(BATCH, GRID * GRID, 3 * PATCH * PATCH),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH),
        "pixel_attention_mask": torch.ones(BATCH, GRID * GRID, dtype=torch.long),
    }


def two_resolutions(model: Any) -> Inputs:
    return one_image(model) | {"high_res_pixel_values": noise(BATCH, 3, 2 * IMAGE, 2 * IMAGE, seed=3)}


def flat_patches(model: Any) -> Inputs:
    return {"pixel_values": noise(BATCH, GRID * GRID, 3 * PATCH * PATCH)}


def with_question(model: Any) -> Inputs:
    ids = text(0)["input_ids"]
    return one_image(model) | {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def video_with_question(model: Any) -> Inputs:
    return with_question(model) | video(2)(model)


def _types(images: Callable[[Any], Inputs], names: str) -> dict[str, Callable[[Any], Inputs]]:
    return dict.fromkeys(names.split(), images)


IMAGES: dict[str, Callable[[Any], Inputs]] = {
    **_types(
        one_image,
        "aria aya_vision blip-2 chameleon cohere2_vision deepseek_vl gemma3 got_ocr2 internvl janus llama4 llava ovis2 "
        "paligemma pp_chart2table qianfan_ocr shieldgemma2 video_llava vipllava",
    ),
    **_types(sized_image, "mistral3 lighton_ocr mistral_large4 emu3"),
    **_types(tiles(2), "idefics2 idefics3 smolvlm"),
    **_types(sized_tiles(3, IMAGE // 2, 2 * IMAGE), "llava_next llava_next_video llava_onevision"),
    **_types(
        patches,
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe cohere_compass cosmos3_omni "
        "exaone4_5 glm4v glm46v glm4v_moe glmga glm_ocr hyperclovax_vision_v2 lfm3_vl minimax_m3_vl "
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker muse_glimmer",
    ),
    **_types(square_patches, "kimi_k25 paddleocr_vl"),
    "lfm2_vl": padded_patches,
    "deepseek_vl_hybrid": two_resolutions,
    "fuyu": flat_patches,
    "instructblip": with_question,
    "instructblipvideo": video_with_question,
}

# -- images that do not stand in the text as placeholders --------------------------------------------------------------


def beside_text(model: Any) -> Inputs:
    """The text does not mention the image: the decoder attends to it, or has it in front."""
    return text(0) | one_image(model)


def decoded(images: Callable[[Any], Inputs]) -> Callable[[Any], Inputs]:
    """An encoder reads the image, a decoder writes text."""
    return lambda model: images(model) | {"decoder_input_ids": text(0)["input_ids"]}


def encoded_with_text(model: Any) -> Inputs:
    """An encoder reads the image and text, a decoder writes text."""
    return _with_placeholders("", model, one_image(model)) | {"decoder_input_ids": text(0)["input_ids"] + 1}


def attended_tiles(model: Any) -> Inputs:
    """Tiles of an image, which cross-attention reads."""
    written, count = text(0), model.config.vision_config.max_num_tiles
    return written | {
        "pixel_values": noise(BATCH, 1, count, 3, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, count, dtype=torch.long),
        "cross_attention_mask": torch.ones(*written["input_ids"].shape, 1, count, dtype=torch.long),
    }


def attended_images(model: Any) -> Inputs:
    written = text(0)
    return written | {
        "pixel_values": noise(BATCH, 2, 3, IMAGE, IMAGE),
        "image_attention_mask": torch.ones(*written["input_ids"].shape, 2, dtype=torch.long),
    }


def marked_positions(images: Callable[[Any], Inputs]) -> Callable[[Any], Inputs]:
    """A mask says which places of the text are the image's."""

    def inputs(model: Any) -> Inputs:
        written = text(model.config.latent_query_num)
        mask = (written["input_ids"] == IMAGE_TOKEN).long()
        return written | images(model) | {"image_embeds_position_mask": mask}

    return inputs


def numbered_patches(model: Any) -> Inputs:
    """Patches that bring their row and column as their first two numbers."""
    rows, columns = torch.meshgrid(torch.arange(1.0, GRID + 1), torch.arange(1.0, GRID + 1), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).expand(BATCH, -1, -1)
    return {"flattened_patches": torch.cat([places, noise(BATCH, GRID * GRID, 3 * PATCH * PATCH)], dim=-1)}


WHOLE: dict[str, Callable[[Any], Inputs]] = {
    **_types(beside_text, "blip git"),
    **_types(decoded(one_image), "vision-encoder-decoder pp_formulanet"),
    **_types(encoded_with_text, "florence2 t5gemma2"),
    "mllama": attended_tiles,
    "idefics": attended_images,
    "kosmos-2": marked_positions(one_image),
    "kosmos-2.5": marked_positions(numbered_patches),
    "pix2struct": decoded(numbered_patches),
}

# The sequence lengths of the tower's patches reach the text decoder too, whose linear attention would obey them.
_NOT_PACKED = ("qwen3_5", "qwen3_5_moe")


# -- what the model makes of them --------------------------------------------------------------------------------------


def _features(model: Any, images: Inputs) -> int:
    """How many places of the text the model fills from the images."""
    owner = model if hasattr(model, "get_image_features") else getattr(model, "model", model)
    made = (owner.get_image_features if hasattr(owner, "get_image_features") else owner.get_video_features)(**images)
    tensors = next(
        t
        for t in map(_tensors, (getattr(made, "pooler_output", None), getattr(made, "last_hidden_state", None), made))
        if t
    )
    return sum(t.numel() // t.shape[-1] for t in tensors)


def _tensors(value: Any) -> list[Tensor]:
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    return [t for t in found if isinstance(t, Tensor)]


def _precomputed(model: Any, inputs: Inputs, *, packed: bool) -> Inputs:
    """What transformers' exporter computes ahead of an encoder from the grid of its patches, because tracing cannot:
    windows, interpolation weights, sequence lengths; and the text's positions."""
    from transformers.exporters.utils import precompute_export_inputs

    tower = model.get_encoder(modality="image")
    made: Inputs = {"grid_thw": inputs["image_grid_thw"]}
    precompute_export_inputs(tower, made)
    outer = {k: v for k, v in inputs.items() if k != "pixel_values"}
    precompute_export_inputs(model.model if hasattr(model, "model") else model, outer)
    left_out = ("grid_thw", "position_ids") + (() if packed else ("cu_seqlens",))
    kept = {k: v for k, v in made.items() if k not in left_out and v is not None}
    return kept | {k: v for k, v in outer.items() if k == "position_ids"}
