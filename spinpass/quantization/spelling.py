"""The parts that a scheme such as ``w4g128-gptq-a8-kv4`` is spelled with, and names that people know for schemes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spinpass.config import nearest_name
from spinpass.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One part of a scheme: a pattern of its spellings, an example, what it means, what runs it, and, of parts of which
    there may be one only, what such a part says."""

    pattern: str
    example: str
    meaning: str
    runs_as: str
    says: str = ""


PARTS: tuple[Part, ...] = (
    Part(r"w(\d+)(\.\d+)?(?:g(\d+))?", "w4", "weights of 2, 3, 4 or 8 bits, one scale per output",
         "MatMulNBits; MatMulInteger with 8 bits and a8; 8da4w in ExecuTorch", "the width of the weights"),
    Part(r"w(\d+)(\.\d+)?(?:g(\d+))?", "w4g64", "the same in groups of 16, 32, 64, 128 or 256 inputs", "MatMulNBits",
         "the width of the weights"),
    Part(r"w(\d+)(\.\d+)?(?:g(\d+))?", "w3.5", "weights of several widths, 3.5 bits on average", "MatMulNBits",
         "the width of the weights"),
    Part(r"rows", "rows", "widths differ within a weight too, as in w3.5g64-rows", "a sum of MatMulNBits"),
    Part(r"asym", "asym", "weights with zero points", "MatMulNBits"),
    Part(r"rtn|gptq", "gptq", "how weights are rounded: rtn to nearest, gptq (the default) by calibration", "the same",
         "how weights are rounded"),
    Part(r"bf16", "bf16", "scales are numbers of bfloat16 (the default: of float16)", "8da4w in ExecuTorch"),
    Part(r"order", "order", "GPTQ begins with the largest inputs", "the same"),
    Part(r"fisher", "fisher", "GPTQ weighs tokens by how much the predictions depend on them", "the same"),
    Part(r"a(\d+)(static|channel|asym)?", "a8", "inputs of linear layers in 8 or 4 bits, a range for each token",
         "8 bits: integer products; 4 bits: simulated", "the width of activations"),
    Part(r"a(\d+)(static|channel|asym)?", "a8asym", "the same with zero points", "8da4w in ExecuTorch",
         "the width of activations"),
    Part(r"a(\d+)(static|channel|asym)?", "a8static", "the same in one fixed range", "QuantizeLinear",
         "the width of activations"),
    Part(r"a(\d+)(static|channel|asym)?", "a8channel", "the same in one fixed range for each channel", "simulated",
         "the width of activations"),
    Part(r"kv(\d+)", "kv4", "keys and values in 4 or 8 bits, a range for each token and head",
         "simulated; --kv-cache has kernels", "the width of keys and values"),
    Part(r"sinks", "sinks", "tokens with massive values keep 8 bits where a4 and kv4 meet them", "simulated"),
    Part(r"head(\d+)(?:g(\d+))?", "head8", "the last layer in 2, 3, 4 or 8 bits; in groups, head8g64",
         "as weights; one copy with the table where they are one", "the width of the head"),
    Part(r"embed(\d+)(?:g(\d+))?", "embed8", "the token tables in 2, 4 or 8 bits; in groups, embed8g64",
         "GatherBlockQuantized", "the width of the token tables"),
    Part(r"(distill|learn)(\d*)", "distill", "one round of learning scales from the original, or as many as follow it",
         "the same", "what is learned"),
    Part(r"(distill|learn)(\d*)", "learn", "the same, and what every weight is rounded to", "the same",
         "what is learned"),
)  # fmt: skip
"""Every kind of part, in the order in which a scheme is usually written."""

LEARNED: Mapping[str, tuple[str, ...]] = {"distill": ("scales",), "learn": ("scales", "offsets")}
"""What the parts stand for that ask to learn."""

ALIASES: Mapping[str, str] = {
    "int4": "w4g32-rtn-a8-head8-embed8",
    "int8": "w8-rtn-a8-head8-embed8",
    "w4a16": "w4g128-gptq",
    "w8a16": "w8g128-gptq",
    "w4a8": "w4g128-gptq-a8",
    "w8a8": "w8-gptq-a8",
    "w4a4": "w4-asym-gptq-a4",
    "w4a8kv4": "w4-asym-gptq-a8-kv4",
    "w4a4kv4": "w4-asym-gptq-a4-kv4",
    "q4_0": "w4g32-rtn-head8-embed8",
    "q4_1": "w4g32-asym-rtn-head8-embed8",
    "q8_0": "w8g32-rtn-head8-embed8",
}
"""What people call schemes elsewhere, and the parts that come closest. Further parts may follow a name."""


def parts_of(text: str) -> list[str]:
    """Return the parts that a text spells, names replaced by what they stand for.

    Raises ConfigError where a part is unknown, two parts say one thing, or one has no effect beside another.
    """
    parts = [part for given in text.lower().split("-") for part in ALIASES.get(given, given).split("-")]
    said: dict[str, str] = {}
    for part in parts:
        what = _says(text, part)
        if what in said:
            shared = "the same" if what == part else what
            raise ConfigError(f"{said[what]!r} and {part!r} in {text!r} both say {shared}: leave one of them out")
        said[what] = part
    for part in ("order", "fisher"):
        if {"rtn", part} <= set(parts):
            raise ConfigError(f"{part!r} in {text!r} is GPTQ's, and 'rtn' rounds without it: leave one of them out")
    return parts


def _says(text: str, part: str) -> str:
    """Return what a part says, or the part itself. Raises ConfigError for one that is unknown."""
    found = next((known for known in PARTS if re.fullmatch(known.pattern, part)), None)
    if found is None:
        near = nearest_name(part, [*ALIASES, *(known.example for known in PARTS)])
        raise ConfigError(
            f"{part!r} in {text!r} is not a part of a scheme such as w4g128-gptq-a8-kv4{near}; spinpass schemes lists "
            "all"
        )
    return found.says or part
