"""A written checkpoint, tried by those who load it: its logits against the program's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.certificate import narrowest_dtype
from spinpass.errors import VerificationError
from spinpass.evaluation import ProgramScorer
from spinpass.formats import compressed_codes, gptq_codes
from spinpass.loading import LOGIT_BOUNDS, STREAMED_BYTES, LoadedModel, declared_online, load_model, reloaded_logits
from spinpass.passes import online_transforms
from spinpass.quantization import QuantizedWeight

from .judge import FolderTrial
from .layouts import CheckpointLayout

_TEXT = range(3, 23)  # token ids
_TOO_LARGE = "a model of more than 100 MB is not loaded as a whole: what is declared and its integers are read back"
_SEVERAL = "transformers reads zero points of compressed-tensors of one width alone"
_NO_PACKAGE = "compressed-tensors is not installed: pip install 'spinpass[compressed-tensors]'"


def tried_layout(
    layout: CheckpointLayout,
    folder: Path,
    program: ExportedProgram,
    loaded: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
) -> list[FolderTrial]:
    """Load the folder by whatever reads its layout, and compare its logits with the program's.

    Integers are read back a weight at a time and online transforms as they are declared, whatever the model's size;
    where weights stay in their files, no model is loaded for them as a whole. Floats are read by transformers, and
    compared with those of the folder that they were made of, too; integers by :func:`spinpass.loading.load_model`; what
    compressed-tensors reads, by transformers with that package.

    Raises VerificationError where they differ.
    """
    if layout == "transformers":
        return [_of_floats(folder, program, loaded)]
    read_back(layout, folder, weights)
    if layout == "compressed-tensors":
        _read_transforms(folder, program)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > STREAMED_BYTES:
        return [FolderTrial("all", "prompt", reason=_TOO_LARGE)]
    ids = _ids(loaded)
    expected = ProgramScorer(program).logits(ids).float()
    read = load_model(folder, dtype="auto", cache=False, dequantize=True)
    trials = [_compared("spinpass", ProgramScorer(read.program).logits(ids).float(), expected, program)]
    if layout == "compressed-tensors":
        reason = _untried(loaded)
        if reason:
            trials.append(FolderTrial("transformers", "prompt", reason=reason))
        else:
            trials.append(_compared("transformers", reloaded_logits(folder, ids), expected, program))
    return trials


def read_back(layout: CheckpointLayout, folder: Path, weights: Mapping[str, QuantizedWeight]) -> None:
    """Compare every code that was written with what it should be, one weight at a time.

    Raises VerificationError where one differs, or a weight is missing or left over.
    """
    found: set[str] = set()
    for name, read in gptq_codes(folder) if layout == "gptq" else compressed_codes(folder):
        found.add(name)
        made = weights[name].codes if name in weights else None
        equal = made is not None and torch.equal(read.q, made.q) and torch.equal(read.group_of, made.group_of)
        if made is None or not equal or not torch.equal(read.zeros, made.zeros):
            raise VerificationError(f"the integers of {name} in the files are not those that it was rounded to")
        if not torch.equal(read.scales, made.scales.to(read.scales.dtype)):
            raise VerificationError(f"the scales of {name} in the files are not those that it was rounded by")
    missing = sorted(weights.keys() - found)
    if missing:
        raise VerificationError(f"the files have no integers of {missing[0]}")


def _read_transforms(folder: Path, program: ExportedProgram) -> None:
    """Compare the online transforms that a folder declares with those of the program.

    Raises VerificationError where they differ.
    """
    found, made = declared_online(folder, program), online_transforms(program)
    differing = sorted({f"{each.location} of {each.module}" for each in {*found} ^ {*made}})
    if differing:
        raise VerificationError(f"the files declare another rotation of {differing[0]} than the program has there")


def _untried(loaded: LoadedModel) -> str:
    """Return why transformers cannot be asked; empty where it can."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return _NO_PACKAGE
    assert loaded.companions is not None
    groups = loaded.companions.config.quantization_config["config_groups"].values()
    return "" if len(groups) < 2 or all(g["weights"]["symmetric"] for g in groups) else _SEVERAL


def _ids(loaded: LoadedModel) -> list[int]:
    assert loaded.companions is not None
    vocabulary = int(loaded.companions.config.get_text_config().vocab_size)
    return [token % vocabulary for token in _TEXT]


def _of_floats(folder: Path, program: ExportedProgram, loaded: LoadedModel) -> FolderTrial:
    ids = _ids(loaded)
    found = reloaded_logits(folder, ids)
    trial = _compared("transformers", found, ProgramScorer(program).logits(ids).float(), program)
    source = loaded.source
    if source.kind == "transformers" and source.gguf is None and loaded.report.dequantized is None:
        before = reloaded_logits(source.location, ids, narrowest_dtype(program))
        whose = f"{source.location} gives"
        other = _compared("transformers", found, before, program, whose)
        return max(trial, other, key=lambda each: each.error or 0.0)
    return trial


def _compared(
    runtime: str, found: Tensor, expected: Tensor, program: ExportedProgram, whose: str = "the rotated program has"
) -> FolderTrial:
    bound = LOGIT_BOUNDS[narrowest_dtype(program)]
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= bound:
        raise VerificationError(
            f"{runtime} computes other logits from what was written than {whose} (relative error {error:.1e}, allowed "
            f"{bound:.0e})"
        )
    return FolderTrial(runtime, "prompt", len(found), error, bound)
