"""``recipe.yaml``: what an export was asked for in the end, as options of the command line that ask for it again.

    bits, recipe  ->  rotations, form, scheme, windows  ->  spinpass export MODEL OUT --config OUT/recipe.yaml

What a recipe stands for may be another thing in a later version; what is saved is what it stood for.
"""

from __future__ import annotations

from typing import Any

from spinpass.config import RotationConfig
from spinpass.evaluation import SHIPPED_TEXT

from .request import ExportRequest


def settings_of(
    request: ExportRequest, config: RotationConfig | None, *, windows: int | None, last_logits: bool
) -> dict[str, Any] | None:
    """Return options of ``spinpass export`` by name, without dashes in front; what is at its default is left out.

    Args:
        request: what was asked for.
        config: what was rotated.
        windows: how many windows calibrated; None where none did.
        last_logits: whether the logits are those of the last token alone.

    Returns:
        None where settings cannot be written as options: a plan, matrices, and overrides for single spaces. Consent to
        run the code of a model, and to write over files, is not repeated, nor is a device, which is of a machine.
    """
    if config is not None and (request.plan is not None or config.overrides or config.matrices):
        return None
    rounded = request.scheme is not None or request.int4
    text = request.calibration
    found = _rotations(config) | {
        "to": None if request.to == "onnx" else request.to,
        "bits": None if rounded else 16,
        "quantize": request.quantize,
        "int4": request.int4,
        "keep": list(request.keep),
        "layer": [f"{pattern}={scheme}" for pattern, scheme in request.layers],
        "calibration": None if text is None or text == SHIPPED_TEXT else str(text),
        "samples": windows,
        "learn": request.learn,
        "minutes": request.minutes,
        "learning-seed": request.learning_seed or None,
        "kv-cache": request.kv_cache,
        "dtype": None if request.dtype == "float32" else request.dtype,
        "no-cache": not request.cache,
        "context": request.context,
        "dequantize": request.dequantize,
        "last-logits": last_logits,
        "no-fuse": not request.fuse,
        "no-verify": not request.certify,
        "allow-partial": request.allow_partial,
    }
    return {name: value for name, value in found.items() if value not in (None, False, "", [])}


def _rotations(config: RotationConfig | None) -> dict[str, Any]:
    if config is None:
        return {"rotations": "none"}
    default = RotationConfig()
    found: dict[str, Any] = {"rotations": ",".join(config.rotations), "form": config.form}
    for name in ("kind", "block_size", "seed", "tied", "cache", "exclude"):
        value = getattr(config, name)
        if value != getattr(default, name):
            found[name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
    return found
