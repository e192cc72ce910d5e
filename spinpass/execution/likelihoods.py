"""What a language model's program predicts:  inputs  ->  log p(next token), differentiably where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError

from .interpreter import Watch, execute, flat_inputs


def log_probabilities(
    program: ExportedProgram,
    inputs: object,
    constants: Mapping[str, Tensor],
    *,
    gradients: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """(tokens, vocabulary), float32. ``inputs``, ``constants`` (by placeholder name, in place of the stored ones),
    ``gradients`` and ``watch``: see :func:`.interpreter.execute`.

    Raises ConfigError: inputs that do not fit the program; a first output that is no logits.
    """
    values = {**flat_inputs(program, inputs), **constants}
    logits = execute(program, values, gradients=gradients, watch=watch).outputs[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        raise ConfigError("logits are needed, (..., vocabulary), and the first output of the program is none")
    return torch.log_softmax(logits.flatten(0, -2).float(), -1)
