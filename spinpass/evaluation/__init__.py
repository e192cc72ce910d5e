"""How good a model is on text: perplexity, agreement and divergence, paired over windows."""

from .calibration import (
    CALIBRATION_LENGTH,
    CALIBRATION_WINDOWS,
    SHIPPED_TEXT,
    Tokenize,
    calibration_inputs,
    calibration_text,
    calibration_windows,
    check_windows,
)
from .comparison import Change, Comparison, Perplexity, Scorer, change, compare, compare_each, paired, perplexity
from .request import EvalRequest, Evaluated, RotateAs
from .scoring import OnnxScorer, Opened, ProgramScorer, is_onnx, open_scorer, open_tokenizer, token_ids
from .texts import Windows, read_dataset, read_text, windows
from .timing import Speed, speed

__all__ = [
    "CALIBRATION_LENGTH",
    "CALIBRATION_WINDOWS",
    "SHIPPED_TEXT",
    "Change",
    "Comparison",
    "EvalRequest",
    "Evaluated",
    "OnnxScorer",
    "Opened",
    "Perplexity",
    "ProgramScorer",
    "RotateAs",
    "Scorer",
    "Speed",
    "Tokenize",
    "Windows",
    "calibration_inputs",
    "calibration_text",
    "calibration_windows",
    "change",
    "check_windows",
    "compare",
    "compare_each",
    "is_onnx",
    "open_scorer",
    "open_tokenizer",
    "paired",
    "perplexity",
    "read_dataset",
    "read_text",
    "speed",
    "token_ids",
    "windows",
]
