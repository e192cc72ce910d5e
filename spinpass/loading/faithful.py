"""Whether an exported program is the model: the same logits, in one piece and in several.

A trace follows one call. What a model decides in Python, by the length of the text, by whether there is a cache, or by
a counter, is fixed by it, and the program may then be wrong for every other call without a word. So the program reads a
text from an empty cache in two pieces, the second on what the first left, and the model reads it at once; and a text of
one token. Where the model has a window, the text is longer, if that is not too long to be run here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.certificate import narrowest_dtype
from spinpass.errors import ExportError, SpinpassError, first_line
from spinpass.execution import (
    InputRole,
    UserInput,
    continued_inputs,
    holds_positions,
    read_in_pieces,
    token_input,
    user_inputs,
)

_LENGTH, _LAST = 20, 3  # tokens of the text, and of its second piece
_PADDING = 3  # tokens
LONGEST_TEXT = 300
"""A text that is tried on a model has no more tokens: beyond every chunk that is in use, and not every window."""

_LIMITS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")

LOGIT_BOUNDS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""How far logits may be from those of the same model run otherwise, relative to the largest, by the program's dtype."""


def check_faithful(model: Any, program: ExportedProgram, name: str) -> None:
    """Compare a program that has a cache of dynamic length with the model it was exported from.

    Raises ExportError where they differ, where the program has no cache, reads no other length than that of its trace,
    or takes other inputs than token ids, positions, a mask and a cache: a decoder is given nothing else.
    """
    ids = _token_ids(program, name)
    state = continued_inputs(program)
    chunked = ids.shape[1] != 1 and any(_is_fixed(spec) for spec in user_inputs(program) if spec.name in state)
    text = _text(model, LONGEST_TEXT if chunked else _LENGTH)
    one, last = text[:, :1], text.shape[1] - _LAST
    with torch.no_grad():
        # short text first: dynamic RoPE remembers longer ones until a short one comes
        expected = [
            model(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False).logits.float()
            for read in (one, text)
        ]
    pieces = torch.split(text, 1, 1) if ids.shape[1] == 1 else (text[:, :last], text[:, last:])
    try:
        found = [read_in_pieces(program, ids, read) for read in ((one,), pieces)]
    except SpinpassError as error:
        raise ExportError(
            f"the program that transformers exports of {name} does not read tokens behind others: a trace has fixed a "
            f"length, so it cannot be exported as one decoder ({first_line(error)})"
        ) from error
    worst = max(
        float((ours.float() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        for ours, theirs in zip(found, expected, strict=True)
    )
    bound = LOGIT_BOUNDS[narrowest_dtype(program)]
    if not worst <= bound:
        raise ExportError(
            f"the program that transformers exports of {name} is not the model: reading {text.shape[1]} tokens in "
            f"pieces gives other logits (relative error {worst:.1e}, allowed {bound:.0e}); a trace has fixed what the "
            "model decides by length or cache, so it cannot be exported as one decoder"
        )


def reads_padding(model: Any, program: ExportedProgram) -> bool:
    """Say whether padding changes the logits of a text, although the mask closes it: by positions that are counted with
    it, or by a recurrence that goes over it.

    Padding stands in front of a text, or, as ONNX Runtime GenAI has it, between a text and what follows. Transformers
    has such models, too; texts of different length are not to be put into one batch for them.
    """
    ids = token_input(user_inputs(program))
    if ids is None or not any(spec.role is InputRole.MASK for spec in user_inputs(program)):
        return False
    text = _text(model, _LENGTH)[:, :_LENGTH]
    length = text.shape[1] + _PADDING
    size = 1 if ids.shape[1] == 1 else length - _LAST
    bound = LOGIT_BOUNDS[narrowest_dtype(program)]
    try:
        alone = read_in_pieces(program, ids, torch.split(text, size, 1)).float()
        for start in (0, text.shape[1] - _LAST):
            seen = torch.ones(length, dtype=torch.int64, device="cpu")
            seen[start : start + _PADDING] = 0
            padded = torch.zeros(1, length, dtype=text.dtype, device="cpu")
            padded[:, seen.bool()] = text
            found = read_in_pieces(program, ids, torch.split(padded, size, 1), seen)[:, seen.bool()].float()
            # a token that sees nothing is no number here, and one in a file
            differ = float((found - alone).abs().max() / alone.abs().max().clamp(min=1e-30))
            if differ > bound:
                return True
    except SpinpassError:
        pass
    return False


def text_limits(config: Any) -> list[int]:
    """Return the numbers of tokens at which a model's attention or positions change, smallest first."""
    text = config.get_text_config()
    named = [getattr(text, limit, None) for limit in _LIMITS]
    rope = getattr(text, "rope_parameters", None) or {}
    named += [part.get(limit) for part in (rope, *rope.values()) if isinstance(part, dict) for limit in _LIMITS]
    return sorted({limit for limit in named if isinstance(limit, int) and limit > 0})


def _is_fixed(spec: UserInput) -> bool:
    """Say whether an input is a state of one size. Such layers read a text in chunks, and a trace has as many as its
    example needs: what is longer is read wrongly, and without an error."""
    return all(isinstance(size, int) for size in spec.shape[1:])


def _text(model: Any, least: int) -> Tensor:
    """Return token ids, int64 (1, length), that go past the model's window where that is not too far: ``least`` of them
    or more, if the model has so many positions."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or LONGEST_TEXT
    wanted = max([least, *(limit + 2 * _LAST for limit in text_limits(config) if limit + 2 * _LAST <= LONGEST_TEXT)])
    rows = model.get_input_embeddings().num_embeddings
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(0, rows, (1, max(_LAST + 1, min(wanted, most))), generator=generator, device="cpu")


def _token_ids(program: ExportedProgram, name: str) -> UserInput:
    """Return the input of token ids. Raises ExportError where a program cannot be fed as a decoder."""
    specs, state = user_inputs(program), continued_inputs(program)
    ids = token_input(specs)
    if ids is None or len(ids.shape) != 2:
        raise ExportError(f"the program of {name} takes no token ids, and cannot be exported as a decoder")
    if not state:
        raise ExportError(
            f"{name} keeps no cache from call to call: add --no-cache (cache=False) to read prompts alone"
        )
    other = [spec.name for spec in specs if spec is not ids and _is_unknown(spec, state)]
    if other:
        raise ExportError(
            f"the program of {name} takes {', '.join(other)} beside token ids, positions, a mask and a cache: it "
            "cannot be exported as a decoder, which is given nothing else"
        )
    return ids


def _is_unknown(spec: UserInput, state: dict[str, int]) -> bool:
    if spec.dtype is None:
        return hasattr(spec.node.meta["val"], "node")  # otherwise the trace has made it a constant
    if spec.name in state:
        return False
    known = spec.role is InputRole.MASK or holds_positions(spec)
    return not known or (len(spec.shape) > 2 and "position" not in spec.name)
