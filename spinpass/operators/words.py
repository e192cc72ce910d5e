"""Codes of 2, 3, 4 or 8 bits in words of 32, as GPTQ checkpoints store them:  a stream of bits, the lowest first.

Code i takes the bits i·b … i·b + b − 1 of the stream, and word k of it holds the bits 32·k … 32·k + 31. For 2, 4 and 8
bits no code crosses a word; 32 codes of 3 bits fill three words, and two of them (the 11th and the 22nd) lie across.
Zero points are packed likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PERIOD = 32  # codes after which a code of any width starts a word


def words(count: int, bits: int) -> int:
    """How many words of 32 bits hold ``count`` codes."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack codes 0 … 2^bits − 1 of any integer dtype along axis ``dim``: int32, contiguous, :func:`words` long there.

    What is left of the last word is zero. Higher bits of a code are ignored.
    """
    moved = codes.movedim(dim, -1).to(torch.int64) & (2**bits - 1)
    count = moved.shape[-1]
    padded = torch.nn.functional.pad(moved, (0, -count % _PERIOD))
    padded = padded.reshape(*moved.shape[:-1], -1, _PERIOD)
    result = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(_PERIOD):
        word, shift = divmod(i * bits, 32)
        result[..., word] |= padded[..., i] << shift
        if shift + bits > 32:
            result[..., word + 1] |= padded[..., i] >> (32 - shift)
    low = (result & 0xFFFFFFFF).flatten(-2)[..., : words(count, bits)]
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).movedim(-1, dim).contiguous()


def unpack_words(packed: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """The inverse of :func:`pack_words`: uint8 codes, with axis ``dim`` of ``packed`` (int32) ``count`` codes long."""
    moved = packed.movedim(dim, -1)
    if 32 % bits == 0:  # no code crosses a word
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        every: Tensor = ((moved[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
        return every.flatten(-2)[..., :count].movedim(-1, dim)
    first = torch.arange(count, device=packed.device) * bits
    word, shift = first // 32, (first % 32).to(torch.int32)
    values = moved[..., word] >> shift
    crossing = shift + bits > 32
    following = moved[..., (word + 1).clamp_max(packed.shape[dim] - 1)] << (32 - shift).clamp_max(31)
    values = torch.where(crossing, (values & ~(-1 << (32 - shift).clamp_max(31))) | following, values)
    low: Tensor = values & (2**bits - 1)
    return low.to(torch.uint8).movedim(-1, dim)
