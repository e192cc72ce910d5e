"""What ``spinpass eval`` is asked for, and how it is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.pipeline import transform
from spinpass.progress import Steps
from spinpass.quantization import quantize as quantized

from .calibration import CALIBRATION_WINDOWS, calibration_inputs, check_calibration, check_windows
from .comparison import Comparison, Perplexity, compare, compare_each, perplexity
from .scoring import Opened, ProgramScorer, open_scorer
from .texts import read_dataset, read_text, windows

RotateAs = Literal["no", "auto", "offline", "online"]


@dataclass(frozen=True)
class Evaluated:
    """``main``: of the model, perhaps against another; ``files``: of ONNX folders, against the model as it was."""

    main: Perplexity | Comparison
    files: Mapping[str, Comparison]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.main.to_dict() | ({"files": {k: c.to_dict() for k, c in self.files.items()}} if self.files else {})


@dataclass(frozen=True)
class EvalRequest:
    """The options of the command. Raises ConfigError for combinations that mean nothing."""

    model: str
    text: Path | None = None
    dataset: str = ""
    against: str = ""
    quantize: str = ""
    calibration: Path | None = None
    calibration_windows: int = CALIBRATION_WINDOWS
    rotate: RotateAs = "no"
    files: tuple[str, ...] = ()
    windows: int = 16
    length: int = 512
    tokenizer: str = ""

    def __post_init__(self) -> None:
        check_windows(self.calibration_windows)
        if self.against and (self.quantize or self.rotate != "no"):
            raise ConfigError("--against compares two models as they are: leave out --quantize and --rotate")
        if self.against and self.files:
            raise ConfigError("--file is compared with MODEL: leave out --against")
        if self.dataset and self.text is not None:
            raise ConfigError("--text and --dataset both name what to score on: leave out one of them")
        if self.quantize:
            check_calibration(self.quantize, self.calibration)

    def run(self, steps: Steps) -> Evaluated:
        """Score the model, or compare it with the other one or with what it was, and with files made of it."""
        opened = open_scorer(self.model, self.tokenizer or None, steps.begin)
        text = read_dataset(self.dataset) if self.dataset else read_text(self.text)
        texts = windows(opened.tokens(text), self.length, self.windows)
        if self.against:
            other = open_scorer(self.against, self.tokenizer or None, steps.begin)
            return Evaluated(compare(other.scorer, opened.scorer, texts, steps.start("compare")), {})
        changed = [self._changed(opened, steps)] if self.quantize or self.rotate != "no" else []
        files = [open_scorer(file, self.tokenizer or None, steps.begin).scorer for file in self.files]
        if not changed and not files:
            return Evaluated(perplexity(opened.scorer, texts, steps.start("score")), {})
        found = compare_each(opened.scorer, [*changed, *files], texts, steps.start("compare"))
        return Evaluated(found[0] if changed else found[0].before, dict(zip(self.files, found[len(changed) :])))

    def _changed(self, opened: Opened, steps: Steps) -> ProgramScorer:
        if opened.program is None:
            raise ConfigError(f"{self.model} is an ONNX model; --quantize and --rotate need the program it was made of")
        program = opened.program
        if self.rotate != "no":
            steps.start("rotate")
            program = transform(program, RotationConfig(form=self.rotate))
        if self.quantize:
            inputs = calibration_inputs(program, opened.tokens, self.calibration, self.length, self.calibration_windows)
            program = quantized(program, self.quantize, inputs, progress=steps.start("quantize")).program
        return ProgramScorer(program)
