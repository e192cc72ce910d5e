"""What ``spinpass eval`` is asked for, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import evaluation
from .config import RotationConfig
from .console import Steps
from .errors import ConfigError
from .quantization import quantize as quantized
from .scoring import Opened, ProgramScorer, open_scorer
from .texts import calibration_inputs, check_calibration, read_text
from .transform import transform

Rotated = Literal["no", "auto", "offline", "online"]


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
        if self.quantize:
            check_calibration(self.quantize, self.calibration)

    def run(self, steps: Steps) -> evaluation.Perplexity | evaluation.Comparison:
        """Score the model, or compare it with the other one or with what it was."""
        opened = open_scorer(self.model, self.tokenizer or None, steps.begin)
        texts = evaluation.windows(opened.tokens(read_text(self.text)), self.length, self.windows)
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
            samples = calibration_inputs(program, opened.tokens, self.calibration, self.length)
            program = quantized(program, self.quantize, samples, progress=steps.start("quantize")).program
        return ProgramScorer(program)
