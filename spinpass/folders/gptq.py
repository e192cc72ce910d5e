"""A GPTQ checkpoint folder, which loaders of such checkpoints read as they read any other.

They know no rotation, so only what is folded into the weights may be rotated, and only weights may be rounded. The
model as it was exported, with the written weights by their names, is proved to be the rotated program.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.certificate import verify
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, VerificationError
from spinpass.formats import QUANTIZE_CONFIG, Draft, write_gptq
from spinpass.graph import ProgramEditor
from spinpass.loading import LoadedModel, declaration
from spinpass.passes import OnlineTransform, is_rotated_online, untie, with_online_transforms
from spinpass.progress import Steps
from spinpass.quantization import QuantizationConfig

from .card import Card, scored_card
from .companions import Written, write_companions
from .judge import FolderTrial
from .result import Result

_ONLINE = ("R4", "heads")
_FOLDED_ROLES = ("R1", "R2")
_NO_ONLINE = "loaders of such checkpoints know no online rotation"
_FOLDED = "use --rotations R1,R2 --form offline --tied untie"
_WITHOUT = "in this model it cannot be folded: leave {role} out of --rotations"
_NOT_TRIED = FolderTrial("transformers", "all", reason="what runs checkpoints of integers is no part of spinpass")
WEIGHTS_ONLY = "--to gptq writes quantized weights: add --quantize, for example w4g128-gptq"


def is_online(config: RotationConfig) -> bool:
    """Return whether a rotation is asked for that may stand online."""
    return config.form == "online" or any(role not in _FOLDED_ROLES for role in config.rotations)


def check_offline(config: RotationConfig) -> None:
    """Raise ConfigError, before anything is loaded, where a rotation is asked for that is online in every model."""
    online = [role for role in config.rotations if role in _ONLINE or (role == "R1" and config.form == "online")]
    if online:
        raise ConfigError(f"{_NO_ONLINE}, such as that of {online[0]}: {_FOLDED}")


def check_weights_alone(scheme: QuantizationConfig, layout: str) -> None:
    """Raise ConfigError where a scheme rounds more than weights, or each in several widths."""
    kind = "GPTQ" if layout == "gptq" else layout
    if scheme.weights is None:
        raise ConfigError(f"a {kind} checkpoint holds rounded weights: name them, for example w4g128-gptq")
    if scheme.activations is not None or scheme.cache is not None:
        raise ConfigError(f"a {kind} checkpoint holds weights alone: leave the parts a… and kv… out of --quantize")
    if scheme.embedding is not None:
        raise ConfigError(
            f"loaders of {kind} checkpoints read integers of linear layers alone: leave the part embed… out of "
            "--quantize"
        )
    if scheme.mixed_rows:
        raise ConfigError(f"weights of a {kind} checkpoint have one width each: leave the part rows out of --quantize")


def check_not_online(loaded: LoadedModel) -> None:
    """Raise ConfigError where the model that was loaded is rotated online already, which its weights do not say."""
    if is_rotated_online(loaded.program):
        raise ConfigError(
            f"{loaded.source.location} is rotated online already, as it declares, and its weights alone are another "
            "model: name the original"
        )


def check_rotation(loaded: LoadedModel, result: Result, *, declared: bool = False) -> None:
    """Raise ConfigError, which says what to ask for instead, where a rotation adds parameters, or is online and the
    layout does not declare such; or where the model came with one that is online."""
    check_not_online(loaded)
    online = [space for space in result.plan.spaces if space.online] if result.plan is not None else []
    if online and not declared:
        first = online[0]
        config = result.plan.config if result.plan is not None else None
        folded = config is not None and not is_online(config)
        advice = _WITHOUT.format(role=first.name.partition(":")[0]) if folded else _FOLDED
        raise ConfigError(f"{_NO_ONLINE}, such as that of {first.name}: {advice}")
    added = sorted(result.program.state_dict.keys() - loaded.program.state_dict.keys())
    if added:
        raise ConfigError(f"the rotation adds {added[0]}, which the model of the configuration has not: leave out R1")
    made, before = result.program.constants, loaded.program.constants
    changed = [name for name in sorted(made.keys() & before.keys()) if not _is_same(made[name], before[name])]
    if changed:
        raise ConfigError(
            f"the rotation changes {changed[0]}, which the model of the configuration makes itself, and no checkpoint "
            "holds: leave out R1"
        )


def _is_same(made: Any, before: Any) -> bool:
    """Whether two constants are the same values; what is no tensor is nobody's to change."""
    if made is before or not isinstance(made, Tensor) or not isinstance(before, Tensor):
        return True
    return made.dtype == before.dtype and torch.equal(made.cpu(), before.cpu())


def write_gptq_folder(
    loaded: LoadedModel, result: Result, draft: Draft, steps: Steps, *, certify: bool = True
) -> Written:
    """Write the integers, everything else in the program's dtype, tokenizer and configuration.

    Raises:
        ConfigError: no weight is quantized, or one does not fit the layout.
        VerificationError: (``certify``) the model's architecture with these weights is another function, as where a
            norm had to become one of another kind.
        ExportError: safetensors is missing, or the folder is not writable.
    """
    made = result.quantization
    if made is None or not made.weights:
        raise ConfigError(WEIGHTS_ONLY)
    if certify:
        steps.start("certify the checkpoint")
        check_same_architecture(loaded, result)
    steps.start("write")
    tensors = {name: t for name, t in result.program.state_dict.items() if name not in made.weights}
    report = write_gptq(draft.folder, made.weights, tensors=tensors)
    files = [path.name for path in report.files]
    quantization = json.loads((draft.folder / QUANTIZE_CONFIG).read_text(encoding="utf-8"))
    about_model = described(loaded, result, quantization)

    def scored() -> Card | str:
        return scored_card(loaded, draft.folder, steps, result.program)

    about = write_companions(about_model, result, {}, files, draft, lambda: [_NOT_TRIED], scored)
    return Written(draft.in_place(report), *about, loading=loaded.report)


def check_same_architecture(loaded: LoadedModel, result: Result, transforms: Sequence[OnlineTransform] = ()) -> None:
    """Prove that the program as it was exported, with the rotated weights and online transforms, is the rotated one.

    Raises VerificationError where it is another function, as where a norm had to become one of another kind.
    """
    found = verify(result.program, _as_exported(loaded, result, transforms))
    if not found.ok:
        raise VerificationError(_another(found.verdict))


def certify_as_exported(loaded: LoadedModel, result: Result, transforms: Sequence[OnlineTransform]) -> None:
    """Prove that the program as it was exported computes the same with the rotated weights and online transforms in it,
    and note the certificate in the result, in which nothing was rounded but the rotated weights to their dtype.

    Raises VerificationError where it does not.
    """
    made = _as_exported(loaded, result, transforms)
    # what is no parameter or buffer of a checkpoint is as the loader makes it
    taken = {spec.arg.name for spec in made.graph_signature.input_specs if spec.target in made.state_dict}
    found = verify(loaded.program, made, exact={name: f for name, f in result.exact.items() if name in taken})
    if not found.ok:
        raise VerificationError(_another(found.verdict))
    result.note(found)


def _as_exported(loaded: LoadedModel, result: Result, transforms: Sequence[OnlineTransform]) -> ExportedProgram:
    editor = ProgramEditor(loaded.program)
    if _unties(result):
        untie(editor, [node for node in editor.nodes if editor.has_alias(node)])
    program = editor.finish()
    program.state_dict.update(result.program.state_dict)
    return with_online_transforms(program, transforms)


def _another(verdict: str) -> str:
    return (
        f"with these weights the model that was exported is another function ({verdict}): its architecture cannot hold "
        "this rotation; leave out R1"
    )


def _unties(result: Result) -> bool:
    return result.plan is not None and result.plan.config.tied == "untie"


def described(loaded: LoadedModel, result: Result, quantization: Mapping[str, Any] | None = None) -> LoadedModel:
    """Return the model with a configuration that says how the weights are stored and rotated, and that the head has its
    own where it has now."""
    if loaded.companions is None:
        return loaded
    config = copy.deepcopy(loaded.companions.config)
    if quantization is not None:
        config.quantization_config = dict(quantization)
    if _unties(result):
        config.tie_word_embeddings = False
    made = record.read(result.program)
    if made is not None:
        setattr(config, record.RECORD_KEY, declaration(made))
    return replace(loaded, companions=replace(loaded.companions, config=config))
