"""Checkpoint to checkpoint: a folder of transformers with R1 and R2 folded into its weights, for any loader of such.

    IN: shards, configuration, tokenizer  ->  OUT: the same names, shapes and dtypes, another basis

The weights are read from the files of IN, folded and written one after the other (:class:`spinpass.graph.Handle`).
The written folder is loaded again by transformers, and its logits are compared with the rotated program's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.certificate import narrowest_dtype
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, VerificationError
from spinpass.evaluation import ProgramScorer
from spinpass.formats import drafted, write_shards
from spinpass.graph import storage_key
from spinpass.loading import LOGIT_BOUNDS, LoadedModel, load_model, reloaded_logits
from spinpass.progress import Silent, Steps

from .card import plural
from .companions import Written, check_target, write_companions
from .endings import still_the_same
from .gptq import check_offline, check_rotation, check_same_architecture, described
from .judge import FolderTrial
from .result import Result, rotated

FOLDED = RotationConfig(rotations=("R1", "R2"), form="offline", tied="untie")
"""What a checkpoint can hold: rotations that are folded into weights."""


_TEXT = range(3, 23)  # token ids
_EXPERTS = "batched_mm"  # transformers' grouped product has no float64, which proofs compute in


@dataclass(frozen=True)
class CheckpointReport:
    """What was written: the folder, its files of weights and their bytes."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    untied: bool

    @property
    def summary(self) -> str:
        """Say it in one line."""
        size = f"checkpoint of {self.bytes / 1e6:.1f} MB in {plural(len(self.files), 'file')}"
        return f"{size}; its head shared the token table, and has one of its own now" if self.untied else size


def rotate_checkpoint(
    model: str | Path,
    out: str | Path,
    config: RotationConfig = FOLDED,
    *,
    dtype: str = "auto",
    certify: bool = True,
    force: bool = False,
    steps: Steps | None = None,
) -> tuple[Result, Written]:
    """Fold rotations into a checkpoint of transformers and write it as one: ``spinpass rotate-checkpoint`` from Python.

    Args:
        model: a model folder, a name on the hub or a GGUF file.
        out: the folder that is written: weights in safetensors files, configuration, tokenizer, ``spinpass.json``.
        config: rotations that are folded, R1 and R2 or one of them. A tied head gets a table of its own, unless the
            config keeps it tied, which leaves R1 out.
        dtype: that of the weights; ``"auto"`` keeps the one they are stored in.
        certify: prove the program, the architecture with these weights, and the written folder equivalent.
        force: write into a folder that holds files of others, too.
        steps: told what begins.

    Returns:
        What was made, and the report, what ``spinpass.json`` holds, and the names of all files.

    Raises:
        ConfigError: a rotation that is online; one that the architecture has no parameters for; no folder of a model.
        RefusedError: nothing can be rotated.
        VerificationError: the architecture with these weights is another function, or transformers reads other values.
        ExportError: transformers or safetensors is missing, or the folder is not writable.
    """
    out, steps = Path(out), steps or Silent()
    check_target(out, str(model), force=force)
    check_offline(config)
    with drafted(out) as draft:
        loaded = load_model(model, dtype=dtype, cache=False, experts=_EXPERTS, streamed=True, progress=steps.begin)
        if loaded.companions is None:
            raise ConfigError(f"{model} is a program, not a checkpoint: name a folder of transformers")
        with still_the_same(loaded.files, steps):
            result = rotated(loaded.program, config, steps, certify=certify)
            check_rotation(loaded, result)
            if certify:
                steps.start("certify the checkpoint")
                check_same_architecture(loaded, result)
            steps.start("write")
            files = write_shards(draft.folder, _once(result.program.state_dict))
            size = sum(path.stat().st_size for path in files)
            made = described(loaded, result)
            report = CheckpointReport(draft.folder, files, size, _is_tied(loaded) and not _is_tied(made))

            def tried() -> list[FolderTrial]:
                if not certify:
                    return [FolderTrial("transformers", "all", reason="switched off")]
                steps.start("try in transformers")
                return [_tried(draft.folder, result.program, made)]

            about = write_companions(made, result, {}, [path.name for path in files], draft, tried)
        steps.finish()
        return result, Written(draft.in_place(report), *about, loading=loaded.report)


def _is_tied(loaded: LoadedModel) -> bool:
    """Whether the configuration says that head and token table are one."""
    assert loaded.companions is not None
    return bool(loaded.companions.config.get_text_config().tie_word_embeddings)


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every constant under the first of its names: transformers ties the others to it."""
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        names.setdefault(storage_key(tensor), name)
    return {name: tensors[name] for name in names.values()}


def _tried(folder: Path, program: ExportedProgram, loaded: LoadedModel) -> FolderTrial:
    """Compare the logits of the folder, as transformers runs it, with the program's, and with those of the folder that
    it was made of.

    Raises VerificationError where they differ.
    """
    assert loaded.companions is not None
    vocabulary = int(loaded.companions.config.get_text_config().vocab_size)
    ids = [token % vocabulary for token in _TEXT]
    found, bound = reloaded_logits(folder, ids), LOGIT_BOUNDS[narrowest_dtype(program)]
    expected = {"the rotated program has": ProgramScorer(program).logits(ids).float()}
    if loaded.source.kind == "transformers" and loaded.source.gguf is None:
        expected[f"{loaded.source.location} gives"] = reloaded_logits(loaded.source.location, ids)
    errors = {what: float((found - w).abs().max() / w.abs().max().clamp(min=1e-30)) for what, w in expected.items()}
    for what, error in errors.items():
        if not error <= bound:
            raise VerificationError(
                f"transformers computes other logits from what was written than {what} (relative error {error:.1e}, "
                f"allowed {bound:.0e})"
            )
    return FolderTrial("transformers", "prompt", len(ids), max(errors.values()), bound)
