"""What becomes of a loaded model before it is written: rotated, certified, quantized."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.certificate import Certificate
from spinpass.config import Matrix, RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import CALIBRATION_LENGTH, LearningText, calibration_inputs, learning_text, token_ids
from spinpass.graph import spooled
from spinpass.learning import LearningRecord
from spinpass.loading import Companions, LoadedModel
from spinpass.pipeline import rotate
from spinpass.planning import RotationPlan
from spinpass.progress import Progress, Steps
from spinpass.quantization import CodesStore, QuantizationConfig, QuantizationReport, Quantized, quantize
from spinpass.rotations import Rotation
from spinpass.version import __version__
from spinpass.workers import Team

_SPOOLED_SHARE = 4  # of the free disk, what is computed from the weights is kept in one of so many parts
_PACKAGES = ("spinpass", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class Result:
    """A program and how it came about.

    ``plan`` is None where no rotation was asked for, ``quantization`` where nothing was rounded. ``scored`` computes
    the logits of every token where the program has those of the last one alone; else it is None. ``settings`` are the
    options that make it again, None where options cannot say it. ``exact`` computes in float64, by placeholder name,
    what rotated constants were before they were rounded, where that was asked for. ``bases`` says how learning the
    changes of basis went, None where none was learned.
    """

    program: ExportedProgram
    plan: RotationPlan | None = None
    quantization: QuantizationReport | None = None
    scored: ExportedProgram | None = None
    settings: Mapping[str, Any] | None = None
    exact: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    bases: LearningRecord | None = None

    @property
    def rounds_activations(self) -> bool:
        """Whether the program rounds more than constants: which way a value at a tie goes is then open."""
        made = self.quantization
        return made is not None and bool(made.activations or made.caches)

    @property
    def exportable(self) -> ExportedProgram | Quantized:
        """What an exporter takes: the program, with its integers where there are any."""
        return self.program if self.quantization is None else Quantized(self.program, self.quantization)

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The certificate in the program's record; None where the program was not certified."""
        found = record.read(self.program)
        return found.certificate if found is not None else None

    def note(self, certificate: Certificate) -> None:
        """Keep the certificate in the program's record, in place of an earlier one."""
        found = record.read(self.program)
        assert found is not None
        record.write(self.program.graph, replace(found, certificate=certificate.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: versions, plan, record, quantization."""
        found = record.read(self.program)
        return {
            "versions": {name: _version_of(name) for name in _PACKAGES} | {"python": platform.python_version()},
            "plan": self.plan and self.plan.to_dict(matrices=False),
            "record": found and found.to_dict(),
            "quantization": self.quantization and self.quantization.to_dict(),
            "learned_bases": self.bases and self.bases.to_dict(),
        }


def rotated(
    program: ExportedProgram,
    config: RotationConfig | None,
    steps: Steps,
    *,
    certify: bool = True,
    exact: bool = False,
    allow_partial: bool = False,
    team: Team | None = None,
    plan: RotationPlan | None = None,
) -> Result:
    """Plan, rotate and certify; without a configuration, return the original. Raises what ``transform`` raises.

    With ``exact`` the result knows what its constants were before they were rounded, for which the original is held.
    A ``plan`` is carried out by its own decisions. Of a ``team`` rank 0 certifies, and the others rotate as it does.
    """
    if config is None:
        return Result(program)
    team = team or Team()
    certify = certify and team.leads
    steps.start("plan")
    tick: Progress | None = None

    def progress(done: int, total: int) -> None:
        nonlocal tick
        tick = tick or steps.start("rotate")  # the first constant is computed when the plan stands
        tick(done, total)
        if done == total and certify:
            steps.start("certify")

    options: dict[str, Any] = {"allow_partial": allow_partial, "exact": exact}
    config = replace(config, verify=certify)
    found = rotate(program, config if plan is None else replace(plan, config=config), progress=progress, **options)
    spaces: list[str] = team.told([space.name for space in found.plan.spaces])
    left_out = [space.name for space in found.plan.spaces if space.name not in spaces]
    if left_out:  # by the certificate of rank 0
        found = rotate(program, plan=found.plan.without(*left_out))
    return Result(found.program, found.plan, exact=found.exact)


def check_names(scheme: QuantizationConfig | None, program: ExportedProgram) -> None:
    """Raise ConfigError where a pattern of a scheme matches no matrix that a program has, before there is any work."""
    if scheme is not None:
        scheme.check_used([name for name, tensor in program.state_dict.items() if tensor.ndim > 1])


def kept_on_disk(program: ExportedProgram, folder: Path, ranks: int = 1) -> ExportedProgram:
    """Return the program with what is computed from its weights kept in files of a folder once it was read.

    It takes a share of the free disk at most, which so many ranks divide among them.
    """
    return spooled(program, folder, shutil.disk_usage(folder).free // (_SPOOLED_SHARE * ranks))


def quantized(
    result: Result,
    loaded: LoadedModel,
    scheme: QuantizationConfig | str,
    text: Path | None,
    steps: Steps,
    windows: int | None = None,
    store: CodesStore | None = None,
    team: Team | None = None,
    checkpoint: Path | None = None,
) -> Result:
    """Calibrate on windows of the text where there is one, quantize, and learn what the scheme asks for.

    ``store`` keeps the codes, which the ranks of a ``team`` make together, and ``checkpoint`` what is being learned.

    Raises ConfigError if the text cannot be read.
    """
    asked = QuantizationConfig.parse(scheme) if isinstance(scheme, str) else scheme
    inputs: list[Any] = []
    read: LearningText | None = None
    if text is not None:
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{loaded.source.location} has no tokenizer to read {text} with: quantize with -rtn")
        tokenize = token_ids(loaded.companions.tokenizer)
        length = window_length(loaded.companions)
        inputs = calibration_inputs(result.program, tokenize, text, length, windows)
        if asked.learn is not None or asked.average_bits:
            read = learning_text(result.program, tokenize, text, asked.learn, len(inputs), length)
    options: dict[str, Any] = {} if read is None else {"training": read.shown, "held_out": read.held_out}
    options |= {"checkpoint": checkpoint, "learning": lambda: steps.start("learn")}
    tick = steps.start("quantize")
    made = quantize(result.program, asked, inputs, store=store, team=team, progress=tick, **options)
    return replace(result, program=made.program, quantization=made.report)


def told(config: RotationConfig | None) -> str:
    """Return all of a configuration as a text, its matrices by their hashes."""
    if config is None or not config.matrices:
        return repr(config)
    held = {name: [given] if isinstance(given, Matrix) else given for name, given in config.matrices.items()}
    digests = {name: list(map(_digest, matrices)) for name, matrices in held.items()}
    return f"{replace(config, matrices={})!r} {digests}"


def told_plan(plan: RotationPlan | None) -> str:
    """Return by which matrices a plan rotates which spaces, as a hash; nothing without a plan."""
    if plan is None:
        return ""
    spaces = "".join(f"{space.name}\0{space.rotation.fingerprint()}\0" for space in plan.spaces)
    return hashlib.sha256(spaces.encode()).hexdigest()


def _digest(matrix: Matrix) -> str:
    if isinstance(matrix, Rotation):
        return matrix.fingerprint()
    shape = str(tuple(matrix.shape)).encode()
    return hashlib.sha256(shape + matrix.double().cpu().numpy().tobytes()).hexdigest()


def run_of(
    loaded: LoadedModel,
    config: RotationConfig | None,
    scheme: object,
    text: Path | None,
    windows: int | None,
    **more: str,
) -> dict[str, str]:
    """Return all that the codes of a run depend on, by what it is called: model, rotations, scheme, text, versions, and
    what ``more`` says."""
    return {
        "model": json.dumps(loaded.files.to_dict(), sort_keys=True),
        "configuration": told(config),
        "scheme": repr(scheme),
        "text": "" if text is None else f"{windows} of {hashlib.sha256(text.read_bytes()).hexdigest()}",
        **more,
        "version": ", ".join(f"{name} {_version_of(name)}" for name in ("spinpass", "torch", "transformers")),
    }


def window_length(companions: Companions) -> int:
    """The tokens of a calibration window: no more than the model has positions for."""
    return min(CALIBRATION_LENGTH, companions.positions or CALIBRATION_LENGTH)


def _version_of(package: str) -> str:
    """The version of an installed package, or of spinpass as it runs, for people to read."""
    if package == "spinpass":  # a source tree may be newer than what is installed
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
