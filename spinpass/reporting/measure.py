"""What a report is asked for, and how it is measured; ``spinpass report`` is its command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from spinpass import evaluation
from spinpass.errors import ConfigError
from spinpass.evaluation import (
    CALIBRATION_WINDOWS,
    ProgramScorer,
    Scorer,
    Tokenize,
    Windows,
    calibration_windows,
    is_exported,
    open_scorer,
    open_tokenizer,
    read_text,
    token_ids,
)
from spinpass.formats import check_made_of, runtime_file
from spinpass.graph import HOST, Device, named_device
from spinpass.loading import check_program_options, locate
from spinpass.planning import RotationPlan
from spinpass.progress import Steps
from spinpass.quantization import QuantizationConfig, quantize
from spinpass.runtime import open_decoder

from .activations import WatchedScorer, paired_sites
from .report import ExportedFile, Origin, Report, Scheme, SchemeSide

_RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pte": "ExecuTorch"}
_NEW_TOKENS, _TURNS = 16, 3  # to time a file by


@dataclass(frozen=True)
class ReportRequest:
    """Which model is run on which text, and quantized by which schemes.

    Calibration windows come from ``calibration``, or from the same text, between those that are scored. ``files`` are
    exported folders made of the model, which are scored and timed in their own runtimes. Raises ConfigError: a scheme
    or a file is named twice, a scheme cannot be read, a folder holds no exported model, there is no such device, or a
    text cannot be read.
    """

    model: str
    text: Path | None = None
    calibration: Path | None = None
    schemes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    windows: int = 8
    length: int = 256
    tokenizer: str = ""
    dequantize: bool = False
    trust_remote_code: bool = False
    device: Device = HOST

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", named_device(self.device))
        for scheme in self.schemes:
            QuantizationConfig.parse(scheme)
            if self.schemes.count(scheme) > 1:
                raise ConfigError(f"the scheme {scheme} is named twice: leave one out")
        for file in self.files:
            if self.files.count(file) > 1:
                raise ConfigError(f"the folder {file} is named twice: leave one out")
            run = runtime_file(file)
            if run is None or not run.is_file():
                raise ConfigError(f"there is no exported model at {file}: name a folder that spinpass export wrote")
        for path in (self.text, self.calibration):
            read_text(path)
        if self.calibration is not None and not self.schemes:
            raise ConfigError("nothing is quantized: leave out --calibration, or name a --scheme such as w4-gptq-a8")

    def preflight(self) -> tuple[Windows, Windows]:
        """Cut the windows as :meth:`cut_windows`, and say what can be said before the model is loaded.

        Raises:
            ConfigError: the model is exported or is not there, an option is not for it, there is no tokenizer, a
                text is too short, or a folder was made of another model.
            ExportError: its configuration says that it cannot be loaded.
        """
        if is_exported(self.model):
            raise ConfigError(f"{self.model} is exported; a report needs the program it was made of: name that")
        asked = {"dequantize": self.dequantize, "trust_remote_code": self.trust_remote_code}
        check_program_options(locate(self.model), **asked)
        for file in self.files:
            check_made_of(Path(file), Path(self.model))
        return self.cut_windows(token_ids(open_tokenizer(self.model, self.tokenizer or None, **asked)))

    def open(self, steps: Steps) -> ExportedProgram:
        """Load and export the model. Raises ConfigError and ExportError where it cannot be loaded."""
        opened = open_scorer(
            self.model,
            self.tokenizer or None,
            steps.begin,
            dequantize=self.dequantize,
            trust_remote_code=self.trust_remote_code,
            device=self.device,
        )
        assert opened.program is not None, "an exported model is refused before"
        return opened.program

    def cut_windows(self, tokenize: Tokenize) -> tuple[Windows, Windows]:
        """Cut the windows that are scored and the calibration windows. Raises ConfigError for too short a text."""
        ids = tokenize(read_text(self.text))
        if not self.schemes:
            return evaluation.windows(ids, self.length, self.windows), []
        if self.calibration is None:
            both = evaluation.windows(ids, self.length, 2 * self.windows)
            return both[::2], both[1::2][:CALIBRATION_WINDOWS]
        others = calibration_windows(tokenize, self.calibration, self.length)
        return evaluation.windows(ids, self.length, self.windows), others

    def measure(
        self,
        programs: tuple[ExportedProgram, ExportedProgram],
        windows: tuple[Windows, Windows],
        plan: RotationPlan,
        certificate: Mapping[str, Any] | None,
        steps: Steps,
        versions: Mapping[str, str],
        command: str = "",
    ) -> Report:
        """Measure everything that the report says.

        ``programs``: before and after rotation; ``windows``: as :meth:`cut_windows` returns them; ``certificate``: as
        :meth:`spinpass.Certificate.to_dict`; ``versions``: those of the packages; ``command``: what was typed. The page
        names both. Raises ExportError where a file cannot be run.
        """
        before = WatchedScorer(programs[0])
        after = WatchedScorer(programs[1], like=before)
        unquantized = evaluation.compare(before, after, windows[0], steps.start("score and watch"))
        pairs, unpaired = paired_sites(before.statistics(), after.statistics())
        schemes = {scheme: self._scheme(scheme, programs, (before, after), windows, steps) for scheme in self.schemes}
        scored = {file: self._file(file, ProgramScorer(programs[0]), windows[0], steps) for file in self.files}
        steps.finish()
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        text = hashlib.sha256(json.dumps(windows[0]).encode()).hexdigest()[:16]
        return Report(
            model=self.model,
            windows=self.windows,
            length=self.length,
            plan=plan,
            certificate=certificate,
            pairs=pairs,
            unpaired=unpaired,
            left=before.left,
            unquantized=unquantized,
            schemes=schemes,
            files=scored,
            bytes=(before.bytes, after.bytes),
            seconds=dict(steps.seconds),
            origin=Origin(date, command, text, torch.get_num_threads(), versions),
        )

    def _file(self, name: str, original: Scorer, windows: Windows, steps: Steps) -> ExportedFile:
        file = runtime_file(name)
        assert file is not None, "looked for before"
        steps.begin(f"open {name}")
        decoder = open_decoder(file)
        comparison = evaluation.compare(original, decoder, windows, steps.start(f"score {name}"))
        prompt, tick = windows[0][: max(1, self.length // 2)], steps.start(f"time {name}")
        new = max(2, min(_NEW_TOKENS, self.length - len(prompt)))
        speed = evaluation.speed({name: decoder}, prompt, new, repeats=_TURNS, progress=tick)[name]
        size = sum(each.stat().st_size for each in _files_of(file))
        return ExportedFile(comparison, size, _RUNTIMES[file.suffix], speed)

    def _scheme(
        self,
        scheme: str,
        programs: tuple[ExportedProgram, ExportedProgram],
        watched: tuple[WatchedScorer, WatchedScorer],
        windows: tuple[Windows, Windows],
        steps: Steps,
    ) -> Scheme:
        original = ProgramScorer(programs[0])
        sides = []
        for program, scorer, name in zip(programs, watched, ("original", "rotated")):
            tick = steps.start(f"quantize {scheme}, {name}")
            made = quantize(program, scheme, [ProgramScorer(program).inputs(ids) for ids in windows[1]], progress=tick)
            errors = {scorer.names.get(fqn, fqn): weight.error for fqn, weight in made.report.weights.items()}
            size = scorer.bytes - (made.report.bytes_before - made.report.bytes_after)
            tick = steps.start(f"score {scheme}, {name}")
            comparison = evaluation.compare(original, ProgramScorer(made.program), windows[0], tick)
            sides.append(SchemeSide(comparison, errors, size))
        return Scheme(*sides)


def _files_of(file: Path) -> list[Path]:
    """The file that a runtime opens, and those beside it with its weights."""
    named = (file.name, f"{file.name}.data", f"{file.stem}.bin")
    return [file.with_name(name) for name in named if file.with_name(name).is_file()]
