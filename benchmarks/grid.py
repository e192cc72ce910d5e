"""The cells of ``accuracy.py``: a model rotated in one way and quantized under one scheme, scored on the same windows.

A measured cell is kept on disk, under a key of what it depends on: the model, the windows, and the sources that this
module reaches by its imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.export import ExportedProgram

import spinpass
from spinpass.config import ROLES, RotationConfig
from spinpass.evaluation import OnnxScorer, ProgramScorer, Scorer, perplexity
from spinpass.exporters import onnx
from spinpass.exporters.onnx import pack_weights
from spinpass.progress import Steps
from spinpass.quantization import Quantized, quantize
from spinpass.tuning import tune

from .imports import ROOT
from .sources import digest

ORT = "ort:"  # in front of a scheme: the exported file with integer codes, in ONNX Runtime
UNQUANTIZED = "none"  # the scheme that does nothing
ORIGINAL, TUNED = "original", "tuned"
VARIANTS: dict[str, RotationConfig | None] = {
    ORIGINAL: None,
    "online": RotationConfig(form="online", verify=False),
    "online+heads": RotationConfig(form="online", rotations=ROLES, verify=False),
    "offline": RotationConfig(form="offline", verify=False),
}
Cell = dict[str, Any]  # JSON-able
Windows = Sequence[Sequence[int]]  # token ids


class Grid:
    """Cells of (scheme, variant), measured or read from disk.

    ``scored``, ``calibration`` and ``held_out`` are windows of token ids: those of the perplexities, those that schemes
    are calibrated on, and those that tuning decides on.
    """

    def __init__(
        self,
        program: ExportedProgram,
        scored: Windows,
        calibration: Windows,
        held_out: Windows,
        out: Path,
        steps: Steps,
    ) -> None:
        self.programs = {ORIGINAL: program}
        self.scored, self.calibration, self.held_out, self.steps = scored, calibration, held_out, steps
        self.folders = dict.fromkeys(VARIANTS, out / key(program, scored, calibration))
        self.folders[TUNED] = out / key(program, scored, calibration, held_out)

    def cell(self, scheme: str, variant: str) -> Cell:
        """The losses of the scored windows in nats per token, and what quantizing took."""
        path = self.folders[variant] / f"{scheme}@{variant}.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found: Cell = {}
        with TemporaryDirectory() as folder:
            scorer: Scorer = ProgramScorer(self.programs[ORIGINAL])
            if scheme != UNQUANTIZED:
                started = time.perf_counter()
                made, about = self._made(scheme.removeprefix(ORT), variant)
                found |= {"seconds": time.perf_counter() - started, "bytes": made.report.bytes_after} | about
                self.steps.begin(f"export {scheme}, {variant}")
                scorer = _in_ort(made, Path(folder)) if scheme.startswith(ORT) else ProgramScorer(made.program)
            tick = self.steps.start(f"score {scheme}, {variant}")
            found |= {"losses": list(perplexity(scorer, self.scored, tick).losses)}
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}.tmp")
        staging.write_text(json.dumps(found), encoding="utf-8")
        os.replace(staging, path)
        return found

    def _made(self, scheme: str, variant: str) -> tuple[Quantized, Cell]:
        """The quantized program, and how its rotation was chosen."""
        if variant == TUNED:
            tuned = tune(self.programs[ORIGINAL], scheme, self.calibration, self.held_out, steps=self.steps)
            return tuned.quantized, {
                "chosen": tuned.chosen.name,
                "trials": {trial.name: trial.comparison.ratio for trial in tuned.trials},
            }
        program = self._program(variant)
        tick = self.steps.start(f"quantize {scheme}, {variant}")
        inputs = [ProgramScorer(program).inputs(ids) for ids in self.calibration]
        return quantize(program, scheme, inputs, progress=tick), {}

    def _program(self, variant: str) -> ExportedProgram:
        if variant not in self.programs:
            self.programs = {ORIGINAL: self.programs[ORIGINAL]}  # one rotated copy at a time
            self.steps.begin(f"rotate, {variant}")
            self.programs[variant] = spinpass.transform(self.programs[ORIGINAL], VARIANTS[variant])
        return self.programs[variant]


def _in_ort(made: Quantized, folder: Path) -> OnnxScorer:
    """The exported file, its weights packed; ``MatMulNBits`` rounds activations itself where the scheme rounds them."""
    onnx.export(made.program, folder / "simulated", verify=False)
    level = 4 if made.report.activations else 0
    report = pack_weights(folder / "simulated", folder / "packed", made.report.weights, accuracy_level=level)
    return OnnxScorer(made.program, report.path)


def key(program: ExportedProgram, *windows: Windows, root: Path = ROOT) -> str:
    """A hash of the weights (the first elements of each), the token ids, and the sources that measuring runs."""
    hashed = hashlib.sha256(json.dumps(windows).encode())
    for name, tensor in program.state_dict.items():
        hashed.update(name.encode() + tensor.detach().flatten()[:64].float().numpy().tobytes())
    hashed.update(digest(__name__, root=root).encode())
    return hashed.hexdigest()[:12]
