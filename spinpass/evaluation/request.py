"""What an evaluation is asked for, and how it is carried out; ``spinpass eval`` is its command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.formats import check_made_of, runtime_file
from spinpass.graph import HOST, Device, named_device
from spinpass.loading import load_config, locate
from spinpass.pipeline import transform
from spinpass.progress import Steps
from spinpass.quantization import QuantizationConfig
from spinpass.quantization import quantize as quantized

from .calibration import SHIPPED_TEXT, calibration_inputs, calibration_windows, check_windows, needs_text
from .comparison import Comparison, Perplexity, compare, compare_each, perplexity
from .scoring import Opened, ProgramScorer, is_exported, open_scorer, open_tokenizer, token_ids
from .texts import read_dataset, read_text, windows

RotateAs = Literal["no", "auto", "offline", "online"]


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    ``main``: of the model, perhaps compared with another; ``files``: ONNX folders, each compared with the original.
    """

    main: Perplexity | Comparison
    files: Mapping[str, Comparison]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return self.main.to_dict() | ({"files": {k: c.to_dict() for k, c in self.files.items()}} if self.files else {})


@dataclass(frozen=True)
class EvalRequest:
    """What is scored on what.

    Args:
        model: a model folder, a name on the hub, a GGUF or .pt2 file, or a folder that ONNX Runtime runs.
        text: UTF-8 text to score on; Python's help texts by default.
        dataset: a dataset to score on instead, as :func:`read_dataset` names it.
        against: another model, which the model is compared with.
        quantize: a scheme that the model is quantized by first, to be compared with the original.
        calibration: UTF-8 text to calibrate on; by default, where the scheme needs one, the text of this package.
        calibration_windows: how many windows of it, of ``length`` tokens; as many as it holds by default, at most 16.
        rotate: the form of R1 in which the model is rotated first, to be compared with the original.
        files: ONNX folders made of the model, each compared with it.
        windows: how many windows are scored.
        length: tokens of each window.
        tokenizer: a folder, where the model has no tokenizer.
        device: where programs are rotated, quantized and run: ``cpu``, ``cuda`` or ``cuda:N``. Files are run on the
            CPU.

    Raises:
        ConfigError: a combination that means nothing, or a device that is not there.
    """

    model: str
    text: Path | None = None
    dataset: str = ""
    against: str = ""
    quantize: str = ""
    calibration: Path | None = None
    calibration_windows: int | None = None
    rotate: RotateAs = "no"
    files: tuple[str, ...] = ()
    windows: int = 16
    length: int = 512
    tokenizer: str = ""
    dequantize: bool = False
    trust_remote_code: bool = False
    device: Device = HOST

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", named_device(self.device))
        if self.quantize:
            text = SHIPPED_TEXT if needs_text(self.quantize) else None
            object.__setattr__(self, "calibration", self.calibration or text)
        check_windows(self.calibration_windows, self.calibration, self.length)
        if self.windows < 1:
            raise ConfigError(f"{self.windows} windows to score on: choose 1 or more")
        if self.against and (self.quantize or self.rotate != "no"):
            raise ConfigError("--against compares two models as they are: leave out --quantize and --rotate")
        if self.against and self.files:
            raise ConfigError("--file is compared with MODEL: leave out --against")
        if self.dataset and self.text is not None:
            raise ConfigError("--text and --dataset both name what to score on: leave out one of them")
        if self.calibration is not None and not (
            self.quantize and QuantizationConfig.parse(self.quantize).uses_calibration
        ):
            scheme = f"{self.quantize} calibrates nothing" if self.quantize else "nothing is quantized"
            raise ConfigError(f"{scheme}: leave out --calibration, or name a scheme such as --quantize w4-gptq-a8")

    def run(self, steps: Steps) -> Evaluated:
        """Score the model, or compare it with the other one or with the original, and compare files made of it.

        Raises ConfigError and ExportError: a model or a text that cannot be read, a text that is too short.
        """
        scored = self._preflight()
        opened = self._open(self.model, steps)
        if self.against:
            other = self._open(self.against, steps)
            return Evaluated(compare(other.scorer, opened.scorer, scored, steps.start("compare")), {})
        changed = [self._changed(opened, steps)] if self.quantize or self.rotate != "no" else []
        files = [self._open(file, steps).scorer for file in self.files]
        if not changed and not files:
            return Evaluated(perplexity(opened.scorer, scored, steps.start("score")), {})
        found = compare_each(opened.scorer, [*changed, *files], scored, steps.start("compare"))
        return Evaluated(found[0] if changed else found[0].before, dict(zip(self.files, found[len(changed) :])))

    def _preflight(self) -> list[list[int]]:
        """Return the windows to score on. What can be said before a model is loaded is said here."""
        for model in filter(None, (self.model, self.against, *self.files)):
            run = runtime_file(model)
            if run is None:
                locate(model)
            elif not run.is_file():
                raise ConfigError(f"there is no file {model}: name a folder that spinpass export wrote")
        for file in self.files:
            check_made_of(Path(file), Path(self.model))
        if is_exported(self.model) and (self.quantize or self.rotate != "no"):
            raise ConfigError(
                f"{self.model} is exported; --quantize and --rotate need the program it was made of: name that"
            )
        if self.device != HOST and all(map(is_exported, filter(None, (self.model, self.against)))):
            raise ConfigError(f"{self.model} is run by its runtime on the CPU: leave out --device {self.device}")
        unloaded = [m for m in (self.model, self.against) if m and not is_exported(m) and locate(m).kind != "program"]
        for option, given in (("--dequantize", self.dequantize), ("--trust-remote-code", self.trust_remote_code)):
            if given and not unloaded:
                raise ConfigError(f"{self.model} is taken as it is: leave out {option}")
        if self.against and not is_exported(self.against):
            load_config(locate(self.against), dequantize=self.dequantize, trust_remote_code=self.trust_remote_code)
        text = read_dataset(self.dataset) if self.dataset else read_text(self.text)
        read_text(self.calibration)
        tokens = token_ids(
            open_tokenizer(
                self.model,
                self.tokenizer or None,
                dequantize=self.dequantize,
                trust_remote_code=self.trust_remote_code,
            )
        )
        scored = windows(tokens(text), self.length, self.windows)
        if self.calibration is not None:
            calibration_windows(tokens, self.calibration, self.length, self.calibration_windows)
        return scored

    def _open(self, model: str, steps: Steps) -> Opened:
        return open_scorer(
            model,
            self.tokenizer or None,
            steps.begin,
            dequantize=self.dequantize,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
        )

    def _changed(self, opened: Opened, steps: Steps) -> ProgramScorer:
        assert opened.program is not None, "an ONNX model is refused before"
        program = opened.program
        if self.rotate != "no":
            steps.start("rotate")
            program = transform(program, RotationConfig(form=self.rotate))
        if self.quantize:
            inputs = calibration_inputs(program, opened.tokens, self.calibration, self.length, self.calibration_windows)
            program = quantized(program, self.quantize, inputs, progress=steps.start("quantize")).program
        return ProgramScorer(program)
