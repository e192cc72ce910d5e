"""What ``spinpass eval`` is asked for, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from . import evaluation
from .config import RotationConfig
from .console import Steps
from .errors import ConfigError
from .quantization import QuantizationConfig
from .quantization import quantize as quantized
from .scoring import Opened, ProgramScorer, open_scorer
from .transform import transform

Rotated = Literal["no", "auto", "offline", "online"]
_SAMPLES = 16  # windows to calibrate on


@dataclass(frozen=True)
class EvalRequest:
    """The options of the command. Raises ConfigError for combinations that mean nothing."""

    model: str
    against: str
    quantize: str
    calibration: Path | None
    rotate: Rotated
    text: Path | None
    windows: int
    length: int
    tokenizer: str

    def __post_init__(self) -> None:
        if self.against and (self.quantize or self.rotate != "no"):
            raise ConfigError("--against compares two models as they are: leave out --quantize and --rotate")
        if self.quantize and QuantizationConfig.parse(self.quantize).needs_calibration and self.calibration is None:
            raise ConfigError(f"{self.quantize} needs a text to calibrate on: add --calibration FILE, or -rtn")

    def run(self, steps: Steps) -> evaluation.Perplexity | evaluation.Comparison:
        """Score the model, or compare it with the other one or with what it was."""
        opened = open_scorer(self.model, self.tokenizer or None, steps.begin)
        texts = evaluation.windows(opened.tokens(_read(self.text)), self.length, self.windows)
        if self.against:
            other = open_scorer(self.against, self.tokenizer or None, steps.begin)
            return evaluation.compare(other.scorer, opened.scorer, texts, steps.start("compare"))
        if not self.quantize and self.rotate == "no":
            return evaluation.perplexity(opened.scorer, texts, steps.start("score"))
        return evaluation.compare(opened.scorer, self._changed(opened, steps), texts, steps.start("compare"))

    def _changed(self, opened: Opened, steps: Steps) -> ProgramScorer:
        if opened.program is None:
            raise ConfigError(f"{self.model} is an ONNX model; --quantize and --rotate need the program it was made of")
        program = opened.program
        if self.rotate != "no":
            steps.start("rotate")
            program = transform(program, RotationConfig(form=self.rotate))
        if self.quantize:
            samples: list[object] = []
            if self.calibration is not None:
                scorer = ProgramScorer(program)
                ids = opened.tokens(_read(self.calibration))
                count = max(1, min(_SAMPLES, len(ids) // self.length))
                samples = [scorer.inputs(window) for window in evaluation.windows(ids, self.length, count)]
            program = quantized(program, self.quantize, samples, progress=steps.start("quantize")).program
        return ProgramScorer(program)


def _read(path: Path | None) -> str:
    if path is None:
        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable UTF-8 text: {error}") from error
