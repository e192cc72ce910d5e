"""How good a model is on text: perplexity, agreement and divergence, paired over windows."""

from .calibration import (
    CALIBRATION_LENGTH,
    CALIBRATION_WINDOWS,
    SELF,
    SHIPPED_TEXT,
    Tokenize,
    calibration_inputs,
    calibration_windows,
    check_windows,
    cut_windows,
    named_dataset,
    needs_text,
)
from .comparison import Change, Comparison, Perplexity, Scorer, change, compare, compare_each, paired, perplexity
from .learning_text import LearningText, learning_text
from .own_text import own_tokens
from .request import EvalRequest, Evaluated, RotateAs
from .scoring import OnnxScorer, Opened, ProgramScorer, is_exported, open_scorer, open_tokenizer, token_ids
from .texts import Windows, library_docs, read_dataset, read_text, windows, windows_between
from .timing import Speed, speed

__all__ = [
    "CALIBRATION_LENGTH",
    "CALIBRATION_WINDOWS",
    "SELF",
    "SHIPPED_TEXT",
    "Change",
    "Comparison",
    "EvalRequest",
    "Evaluated",
    "LearningText",
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
    "calibration_windows",
    "change",
    "check_windows",
    "compare",
    "compare_each",
    "cut_windows",
    "is_exported",
    "learning_text",
    "library_docs",
    "named_dataset",
    "needs_text",
    "open_scorer",
    "open_tokenizer",
    "own_tokens",
    "paired",
    "perplexity",
    "read_dataset",
    "read_text",
    "speed",
    "token_ids",
    "windows",
    "windows_between",
]
