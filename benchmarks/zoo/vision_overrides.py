"""What generic shrinking cannot guess about image-text types."""

from __future__ import annotations

from typing import Any

from .shrink import FF, HIDDEN

_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_MROPE_TEXT = dict(text_config=dict(rope_parameters=_MROPE))

_PINPOINTS = [[32, 64], [64, 32]]
_CODES = 16
_CHAMELEON_WORDS = {"<image>": 149} | {
    f"IMGIMG{''.join('ABCDEFGHIJ'[int(c)] for c in str(k))}Z": 120 + k for k in range(_CODES)
}
_EMU_WORDS = {"<image>": 149, "<|extra_200|>": 148} | {f"<|visual token {k:06d}|>": 120 + k for k in range(_CODES)}
_VQ = dict(base_channels=32, latent_channels=8, embed_dim=8, num_res_blocks=1)
_KOSMOS_TEXT = dict(embed_dim=HIDDEN, layers=2, ffn_dim=FF, attention_heads=4)

SETTINGS: dict[str, dict[str, Any]] = {
    "aria": dict(projector_patch_to_query_dict={16: 4}),
    "blip-2": dict(image_token_index=149, num_query_tokens=4),
    "chameleon": dict(
        vocabulary_map=_CHAMELEON_WORDS,
        vq_config=_VQ | dict(num_embeddings=_CODES, resolution=32, channel_multiplier=[1, 1, 1, 2]),
    ),
    "deepseek_vl_hybrid": dict(high_res_vision_config=dict(image_size=64)),
    "instructblip": dict(image_token_index=149, num_query_tokens=4),
    "instructblipvideo": dict(video_token_index=149, num_query_tokens=2),
    "emu3": dict(
        vocabulary_map=_EMU_WORDS,
        vq_config=dict(
            codebook_size=_CODES, base_channels=32, channel_multiplier=[1, 1, 1, 2], num_res_blocks=1, hidden_size=64,
            attn_resolutions=[],
        ),
    ),
    "gemma3": dict(mm_tokens_per_image=4),
    "shieldgemma2": dict(mm_tokens_per_image=4),
    "idefics2": dict(perceiver_config=dict(resampler_n_latents=3)),
    "llava_next": dict(image_grid_pinpoints=_PINPOINTS),
    "llava_next_video": dict(image_grid_pinpoints=_PINPOINTS),
    "llava_onevision": dict(image_grid_pinpoints=_PINPOINTS),
    "qwen2_vl": _MROPE_TEXT | dict(vision_config=dict(hidden_size=HIDDEN)),
    "qwen2_5_vl": _MROPE_TEXT,
    "ovis2": dict(visual_indicator_token_ids=[]),  # with them, whether the text has one is asked on the host
    "qwen2_5_omni_thinker": _MROPE_TEXT | dict(vision_start_token_id=152),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=152),
    "t5gemma2": dict(encoder=dict(mm_tokens_per_image=4, image_token_index=149), image_token_index=149),
    "vision-encoder-decoder": dict(
        encoder=dict(hidden_size=32, intermediate_size=48), decoder=dict(add_cross_attention=True, is_decoder=True)
    ),
    "glm4v": _MROPE_TEXT,
    "glm46v": _MROPE_TEXT,
    "glmga": _MROPE_TEXT,
    "glm_ocr": _MROPE_TEXT,
    "paddleocr_vl": _MROPE_TEXT,
    "glm4v_moe": dict(text_config=dict(rope_parameters=_MROPE | {"mrope_section": [1, 1, 2]})),
    "vipllava": dict(vision_feature_layers=[-1, -2]),
    "internvl": dict(vision_config=dict(image_size=[32, 32], patch_size=[8, 8])),
    "janus": dict(vq_config=dict(base_channels=32, latent_channels=8, num_embeddings=64)),
    "kimi_k25": dict(projection_hidden_size=32),
    "kosmos-2": dict(latent_query_num=4, text_config=_KOSMOS_TEXT),
    "kosmos-2.5": dict(latent_query_num=4, text_config=_KOSMOS_TEXT),
    "llama4": dict(
        vision_config=dict(projector_input_dim=48, projector_output_dim=48, vision_output_dim=48, intermediate_size=128)
    ),
    "mllama": dict(
        text_config=dict(num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config=dict(num_global_layers=1, intermediate_layers_indices=[0, 1], vision_output_dim=96),
    ),
    "muse_glimmer": dict(out_hidden_size=128, projector_hidden_size=64),
    "paligemma": dict(projection_dim=HIDDEN, vision_config=dict(projection_dim=HIDDEN)),
    "pix2struct": dict(text_config=dict(d_kv=16, d_ff=96), vision_config=dict(hidden_size=HIDDEN, d_kv=16)),
    "pp_formulanet": dict(
        vision_config=dict(
            output_channels=16, post_conv_in_channels=16, post_conv_mid_channels=24, post_conv_out_channels=32,
            decoder_hidden_size=HIDDEN,
        )
    ),
    "florence2": dict(
        vision_config=dict(
            embed_dim=[16, 32], depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1],
            patch_prenorm=[False, True], num_heads=[2, 4], num_groups=[2, 4], window_size=4, projection_dim=HIDDEN,
        )
    ),
}  # fmt: skip

# Types without a text+image program from transformers 5.23 and torch 2.13, and why: no fault of the pass. Those that
# are "not built here" may well export once somebody writes their settings.
NOT_EXPORTABLE: dict[str, str] = {
    "cosmos3_edge": "not built here: its m-RoPE sections have to be set to fit the heads",
    "deepseek_ocr2": "not built here: its default configuration leaves what its tower is made of unset",
    "diffusion_gemma": "not built here: its default configuration leaves a size unset",
    "dots3_note": "not built here: the adapter's width has to be set to the tower's",
    "ernie4_5_vl_moe": "the resampler slices by numbers that it reads out of image_grid_thw while it is traced",
    "evolla": "takes proteins, not images",
    "fast_vlm": "not built: its tower needs timm and PIL",
    "gemma3n": "not built: its tower needs timm and PIL",
    "gemma4": "its default configuration has no tower",
    "gemma4_unified": "its default configuration has no tower",
    "glm5_next": "not built here: the sizes of its sparse attention have to be set to fit each other",
    "granite4_vision": "not built here: its default configuration has no map of deep features",
    "granite_docling": "not built here: the tower's output width has to be set to the text's",
    "hunyuan_vl": "a Python loop over image_grid_thw resamples positions to sizes that are unknown when it is traced",
    "inkling2": "not built here: the tower's output width has to be set to the text's",
    "inkling_mm_model": "not built: needs scipy",
    "minicpm_ocr": "the merger slices by numbers that it reads out of target_sizes while it is traced",
    "minicpmv4_6": "the merger slices by numbers that it reads out of target_sizes while it is traced",
    "minicpmv4_7": "the merger slices by numbers that it reads out of target_sizes while it is traced",
    "mistral4": "text only",
    "molmo2": "not built here: the adapter's layers have to be set to ones that the tower has",
    "muse_spark": "not built here: the audio tower's output width has to be set to the text's",
    "nemotron_h_omni": "not built here: the sizes of its video patches have to be set to agree",
    "perception_lm": "not built: its tower needs timm and PIL",
    "pi0": "takes a robot's state and returns actions",
    "qwen4_exp": "its sparse-attention indexer branches on the number of complete blocks",
    "step3p7": "a Python loop over the experts that were hit",
    "udop": "writes to a mask that it makes inside the traced forward at places that depend on the boxes",
    "unlimited_ocr": "not built here: the widths of its two towers have to be set to agree",
    "video_llama_3": "a Python loop over image_grid_thw reshapes to sizes that are unknown when it is traced",
}
