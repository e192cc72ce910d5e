"""Integers as the kernels of ONNX Runtime take them: blocks of 16 to 256 weights along the inputs, packed into bytes.

One scale per output channel, or a group of several blocks, is the same scale repeated; three bits are stored as four,
whose grid holds them. The values (q − z)·s stay, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.quantization import Codes

_BLOCKS = (256, 128, 64, 32, 16)

STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
"""How many bits a weight of so many bits takes in a file."""


def block_size(codes: Codes, name: str) -> int:
    """Return the largest block that no group border cuts; for one group per row, the one that wastes fewest weights.

    Raises ConfigError: no block divides the groups' size, or their columns do not lie side by side.
    """
    columns, groups = codes.q.shape[1], codes.scales.shape[1]
    if groups == 1:
        return min(_BLOCKS, key=lambda b: (-(-columns // b) * b, -b))
    size = codes.group_length
    if size is None:
        raise ConfigError(f"the groups of {name} do not lie side by side, as MatMulNBits needs them")
    fitting = [b for b in _BLOCKS if size % b == 0]
    if not fitting:
        raise ConfigError(f"the groups of {name} have {size} weights; MatMulNBits takes multiples of {_BLOCKS[-1]}")
    return fitting[0]


def blocks(codes: Codes, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in padded to blocks) uint8, scales (out, blocks) and zero points (out, blocks) uint8.

    The padding stands for zero.
    """
    return padded(codes, block), by_block(codes, codes.scales, block), by_block(codes, codes.zeros, block)


def padded(codes: Codes, block: int) -> Tensor:
    """Return the codes, uint8 (out, in padded to blocks). The padding stands for zero."""
    short = -codes.q.shape[1] % block
    return torch.cat([codes.q, codes.zeros[:, -1:].expand(-1, short)], 1) if short else codes.q


def by_block(codes: Codes, groups: Tensor, block: int) -> Tensor:
    """Return what each group has (out, groups), scales or zero points, for every block (out, blocks)."""
    count = -(-codes.q.shape[1] // block)
    return groups if count == groups.shape[1] else groups[:, codes.group_of[torch.arange(count, device="cpu") * block]]


def packed_bits(q: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Pack uint8 values below 2^bits along the last axis, the first in the lowest bits; rows are padded with zeros."""
    per = 8 // bits
    if per == 1:
        return np.asarray(q)
    packed = torch.zeros(*q.shape[:-1], -(-q.shape[-1] // per), dtype=torch.uint8, device="cpu")
    for k in range(min(per, q.shape[-1])):
        every = q[..., k::per]
        packed[..., : every.shape[-1]] |= every << (k * bits)
    return np.asarray(packed)
