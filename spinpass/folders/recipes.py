"""Recipes: what ``--bits`` and ``--recipe`` stand for, as values.

    (recipe, bits, runtime)  ->  what is rotated, the scheme of the weights, how many windows calibrate it

``auto`` is the best that was measured for the runtime's kernels, ``quick`` the same on fewer windows, without training
the scales or weighing tokens, and ``plain`` rounds the original to nearest, as other tools do. Sixteen bits keep the
values as they are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spinpass.config import DEFAULT_ROLES, RotationConfig
from spinpass.errors import ConfigError
from spinpass.learning import Learning

RecipeName = Literal["auto", "quick", "plain"]
LearnName = Literal["none", "local", "full"]
BITS = (16, 8, 4, 3, 2)
DEFAULT_BITS = 4
MEASURED = Path(__file__).with_name("measured.json")

# R3 costs time, and changes what a rounded cache alone sees. Rotating all heads together gained nothing here.
_ROTATED = RotationConfig(form="online", rotations=tuple(role for role in DEFAULT_ROLES if role != "R3"))
_CACHED = RotationConfig(form="online")
_TABLES = "head8g64-embed8g64"  # of one copy where they are one; a scale for each row alone costs 0.3 % of perplexity
# Moves of what weights are rounded to gain nothing in the time that an export may take, and need most of its memory.
_LEARNED = ("scales", "gains")
_ROUNDS = 3
_WINDOWS = {"auto": 32, "quick": 8}

# Groups of 32 and 64 divide the widths of every model but a few, and no kernel pads them. Groups of 32 with scales of
# two bytes take what groups of 64 take with scales of four, and the kernel rounds what it multiplies by group as well.
# Zero points cost 0.13 bits a weight and take a tenth of the divergence away. Eight bits for a tenth of the weights in
# groups of 64 take as much again: predictions then lie nearer to the model's, and texts are predicted less well. Three
# bits are stored as two and four, by rows. With three and two, tokens count in GPTQ by what depends on them: 1.258
# times the floats' perplexity became 1.238, and 2.98 became 2.84, for two minutes more with a small model.
_ONNX = {
    8: f"w8g32-gptq-a8-{_TABLES}",
    4: f"w4g32-asym-gptq-a8-distill-{_TABLES}",
    3: f"w3.0g64-asym-gptq-fisher-rows-a8-distill-{_TABLES}",
    2: f"w2g64-asym-gptq-fisher-a8-distill-{_TABLES}",
}
# XNNPACK has no other integer products. Its tokens have zero points, and its scales of groups are bfloat16.
_EXECUTORCH = {8: "w8-gptq-a8asym", 4: "w4g32-bf16-gptq-a8asym-distill"}
# OpenVINO rounds activations by itself where it multiplies by integers, so weights alone are rounded here.
_OPENVINO = {
    8: f"w8g64-gptq-{_TABLES}",
    4: f"w4g64-asym-gptq-distill-{_TABLES}",
    3: f"w3.0g64-asym-gptq-fisher-rows-distill-{_TABLES}",
    2: f"w2g64-asym-gptq-fisher-distill-{_TABLES}",
}
_GPTQ = {8: "w8g128-gptq", 4: "w4g128-gptq", 3: "w3g128-gptq", 2: "w2g64-gptq"}
_SCHEMES = {"onnx": _ONNX, "openvino": _OPENVINO, "executorch": _EXECUTORCH, "gptq": _GPTQ}


@dataclass(frozen=True)
class Recipe:
    """What is rotated (None: nothing), the scheme (empty: nothing is rounded), and how many windows calibrate it (None:
    as many as there are by default)."""

    config: RotationConfig | None
    scheme: str
    windows: int | None


def recipe_of(name: str, bits: int, to: str, *, rounds_cache: bool = False) -> Recipe:
    """Return what a recipe stands for.

    Args:
        name: auto, quick or plain.
        bits: of the weights of linear layers, one of :data:`BITS`.
        to: the runtime, as :func:`spinpass.folders.export` calls it.
        rounds_cache: keys and values are rounded too. OpenVINO does that by itself.

    Raises:
        ConfigError: there is no such recipe, or the runtime has no kernel for so many bits.
    """
    if name not in get_args(RecipeName):
        raise ConfigError(f"recipe={name!r} is not one of {', '.join(get_args(RecipeName))}")
    if bits not in BITS:
        raise ConfigError(f"bits={bits} is not one of {', '.join(map(str, BITS))}")
    if bits == 16:
        return Recipe(None if name == "plain" else RotationConfig(), "", None)
    schemes = _SCHEMES[to]
    if bits not in schemes:
        raise ConfigError(f"--to {to} has no kernel for {bits} bits: choose one of {', '.join(map(str, schemes))}")
    if name == "plain":
        return Recipe(None, _to_nearest(schemes[bits]), None)
    if to == "gptq":
        rotated = RotationConfig(rotations=("R1", "R2"), form="offline", tied="untie")
    else:
        rotated = _CACHED if rounds_cache or to == "openvino" else _ROTATED
    scheme = schemes[bits] if name == "auto" else _without(schemes[bits], "distill", "fisher")
    return Recipe(rotated, scheme, _WINDOWS[name])


def learning_of(name: LearnName, minutes: float | None) -> Learning | None:
    """Return what ``--learn`` and ``--minutes`` stand for.

    Args:
        name: none; local, block by block in the memory of one; or full, all together by what the original predicts.
        minutes: the wall-clock time that it may take; None for three rounds through the text.
    """
    if name == "none":
        return None
    return Learning(_LEARNED, (name,), rounds=_ROUNDS, minutes=minutes)


def bases_of(minutes: float | None, seed: int = 0) -> Learning:
    """Return how changes of basis are learned: block by block, in one round through the text."""
    return Learning(("transforms",), ("local",), minutes=minutes, seed=seed)


def measured() -> dict[str, Any]:
    """Return what ``python -m benchmarks.yardstick`` has kept of the recipes for ONNX Runtime.

    ``about`` says of what; ``rows`` has, by bits, MB and perplexity ÷ that of the floats, the mean and the worst of all
    texts. Only schemes that are still those of the recipes are in it.
    """
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    current = {bits: row for bits, row in found["rows"].items() if row["scheme"] == _ONNX.get(int(bits))}
    return found | {"rows": current}


def _to_nearest(scheme: str) -> str:
    """Return the scheme as other tools have it: symmetric, to nearest, of one width in blocks of 32."""
    parts = _without(scheme, "asym", "rows", "distill", "fisher").split("-")
    width = parts[0].split("g")[0].split(".")[0]
    groups = "g32" if "g" in parts[0] else ""
    return "-".join([f"{width}{groups}", *("rtn" if part == "gptq" else part for part in parts[1:])])


def _without(scheme: str, *left_out: str) -> str:
    return "-".join(part for part in scheme.split("-") if part not in left_out)
