"""What a language model's program predicts:  inputs  ->  log p(next token), differentiably where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError

from .interpreter import Watch, execute, flat_inputs
from .recomputed import first_output


def log_probabilities(
    program: ExportedProgram,
    inputs: object,
    constants: Mapping[str, Tensor],
    *,
    gradients: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """Return log p(next token), float32 (tokens, vocabulary), of the program's first output, which are its logits.

    Args:
        program: the program of a language model.
        inputs: what :func:`.interpreter.flat_inputs` takes.
        constants: values to take in place of stored constants, by placeholder name.
        gradients: record the gradients of the values that require them; where that would keep too many values they are
            computed a second time (:mod:`.recomputed`).
        watch: called with every node that is run and its value; it returns the value to go on with.

    Raises:
        ConfigError: the inputs do not fit the program, or its first output is no logits.
        ProgramError: the program could not be run.
    """
    values = {**flat_inputs(program, inputs), **constants}
    if gradients:
        logits = first_output(program, values, watch=watch)
    else:
        logits = execute(program, values, watch=watch).outputs[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        raise ConfigError("logits are needed, (..., vocabulary), and the first output of the program is none")
    return torch.log_softmax(logits.flatten(0, -2).float(), -1)
