"""How good a model is on text: perplexity, agreement and divergence, paired over windows."""

from .comparison import (
    Change,
    Comparison,
    Perplexity,
    Scorer,
    Speed,
    change,
    compare,
    compare_each,
    paired,
    perplexity,
    speed,
    windows,
)
from .request import EvalRequest, Evaluated, Rotated
from .scoring import OnnxScorer, Opened, ProgramScorer, open_scorer, token_ids
from .texts import (
    LENGTH,
    SAMPLES,
    calibration_inputs,
    calibration_windows,
    check_calibration,
    check_samples,
    read_dataset,
    read_text,
)

__all__ = [
    "LENGTH",
    "SAMPLES",
    "Change",
    "Comparison",
    "EvalRequest",
    "Evaluated",
    "OnnxScorer",
    "Opened",
    "Perplexity",
    "ProgramScorer",
    "Rotated",
    "Scorer",
    "Speed",
    "calibration_inputs",
    "calibration_windows",
    "change",
    "check_calibration",
    "check_samples",
    "compare",
    "compare_each",
    "open_scorer",
    "paired",
    "perplexity",
    "read_dataset",
    "read_text",
    "speed",
    "token_ids",
    "windows",
]
