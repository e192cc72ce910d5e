"""Text that a model writes itself, to calibrate on where no text like its own is at hand.

    a token at random  ->  four likeliest ones  ->  draws at temperature 1, row by row

This is how data-free quantization makes its text (LLM-QAT, arXiv 2305.17888, section 3.1): a few likeliest tokens lead
to something that can be said, and draws keep the variety of what the model has read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.execution import (
    UserInput,
    continued_inputs,
    reading_inputs,
    reading_sizes,
    run,
    token_input,
    user_inputs,
)
from spinpass.progress import Progress

_LIKELIEST = 4  # tokens after the first


def own_tokens(
    program: ExportedProgram, rows: int, length: int, *, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Let a program with a KV cache write.

    Args:
        program: its first output is the logits, (batch, tokens, vocabulary).
        rows: how many texts are written at once.
        length: tokens of each.
        seed: of the draws.
        progress: called with (done, total) tokens of a row.

    Returns:
        The tokens, int64 (rows, length).

    Raises:
        ConfigError: the program hands on no state, or which input takes the tokens is not clear.
    """
    specs, state = user_inputs(program), continued_inputs(program)
    ids = token_input(specs)
    if ids is None or not state:
        raise ConfigError("the program hands on no cache that it could write text with: name a file to calibrate on")
    if isinstance(ids.shape[0], int) and ids.shape[0] != rows:
        parts = [own_tokens(program, 1, length, seed=seed + k, progress=progress) for k in range(rows)]
        return torch.cat(parts)
    generator = torch.Generator("cpu").manual_seed(seed)  # draws are made there, the same for every device
    held: dict[str, Tensor] = {}
    logits = _step(program, specs, ids, torch.zeros(rows, 1, dtype=ids.dtype, device=ids.device), 0, {})[0]
    newest = torch.randint(logits.shape[-1], (rows, 1), generator=generator, device="cpu")
    written = [newest]
    while len(written) < length:
        outputs = _step(program, specs, ids, newest.to(ids.dtype), len(written) - 1, held)
        held = {name: outputs[index] for name, index in state.items()}
        scores = outputs[0][:, -1].float().cpu()
        if len(written) <= _LIKELIEST:
            newest = scores.argmax(-1, keepdim=True)
        else:
            newest = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        written.append(newest)
        if progress is not None:
            progress(len(written), length)
    return torch.cat(written, 1)


def _step(
    program: ExportedProgram,
    specs: list[UserInput],
    ids: UserInput,
    tokens: Tensor,
    past: int,
    held: dict[str, Tensor],
) -> list[Tensor]:
    """Run a program on one more token of each row."""
    sizes = reading_sizes(specs, ids, tokens, past)
    return list(run(program, reading_inputs(specs, ids, tokens, sizes, past, held)))
