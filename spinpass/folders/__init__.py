"""A whole model folder, written: the model, its tokenizer and configuration, ``spinpass.json``; :func:`export` does it
all.
"""

from .basis import BasisProof, check_basis
from .card import Card, card_lines, plural, weight_count
from .checkpoint import FOLDED, rotate_checkpoint
from .companions import SETTINGS, Written, check_target, check_writable
from .demo import (
    ANSWER_TOKENS,
    DEMO_MODELS,
    DEMO_NEW_TOKENS,
    DEMO_PROMPT,
    DEMO_TEXTS,
    DEMO_WINDOW,
    PROMPTS,
    DemoModel,
    DemoRequest,
    packaged_model,
)
from .forecast import MARGIN, Forecast, StepForecast
from .judge import runtime_names
from .layouts import CheckpointLayout, CheckpointReport, CheckpointRequest
from .machine import IMPORTED, Rates, free_memory, own_memory
from .making import carry_out, export
from .onnx import onnx_tools, write_folder
from .preflight import Known, check_space
from .recipes import BITS, MEASURED, LearnName, Recipe, RecipeName, measured, recipe_of
from .request import ExportRequest, IntegerCache, Target
from .result import Result, check_names, quantized, rotated, window_length
from .workload import Workload

__all__ = [
    "ANSWER_TOKENS",
    "BITS",
    "DEMO_MODELS",
    "DEMO_NEW_TOKENS",
    "DEMO_PROMPT",
    "DEMO_TEXTS",
    "DEMO_WINDOW",
    "FOLDED",
    "IMPORTED",
    "MARGIN",
    "MEASURED",
    "PROMPTS",
    "SETTINGS",
    "BasisProof",
    "Card",
    "CheckpointLayout",
    "CheckpointReport",
    "CheckpointRequest",
    "DemoModel",
    "DemoRequest",
    "ExportRequest",
    "Forecast",
    "IntegerCache",
    "Known",
    "LearnName",
    "Rates",
    "Recipe",
    "RecipeName",
    "Result",
    "StepForecast",
    "Target",
    "Workload",
    "Written",
    "card_lines",
    "carry_out",
    "check_basis",
    "check_names",
    "check_space",
    "check_target",
    "check_writable",
    "export",
    "free_memory",
    "measured",
    "onnx_tools",
    "own_memory",
    "packaged_model",
    "plural",
    "quantized",
    "recipe_of",
    "rotate_checkpoint",
    "rotated",
    "runtime_names",
    "weight_count",
    "window_length",
    "write_folder",
]
