"""What random rotations are drawn from: bytes that depend on a seed and a name, on any machine and version of torch."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def signs(count: int, seed: int, identity: str) -> tuple[int, ...]:
    """So many of ±1, one bit each.

    They are integers, since a tensor made under a tracing mode would be fake and must not be kept.
    """
    stream = random_bytes(-(-count // 8), seed, identity)
    return tuple(1 - 2 * (stream[i >> 3] >> (i & 7) & 1) for i in range(count))


@lru_cache(maxsize=4)
def haar_matrix(order: int, seed: int, identity: str) -> Tensor:
    """A uniformly distributed orthogonal matrix (order, order), float64.

    Q of the QR decomposition of a Gaussian matrix, with the signs of R's diagonal taken out (F. Mezzadri, Notices of
    the AMS 54, 2007); Gaussians by Box and Muller, two uniform variables each.
    """
    with torch.inference_mode(False):  # kept for later callers, who may want gradients
        words = torch.frombuffer(random_bytes(16 * order * order, seed, identity), dtype=torch.int64)
        first, second = ((words >> 11 & (1 << 53) - 1).double() + 0.5).mul_(2.0**-53).view(2, order, order)
        q, r = torch.linalg.qr((-2 * first.log()).sqrt() * (2 * math.pi * second).cos())
        haar: Tensor = q * r.diagonal().sign()
    return haar


def random_bytes(count: int, seed: int, identity: str) -> bytearray:
    """So many bytes that depend on seed and identity only, not on the machine or the version of torch."""
    key = hashlib.sha256(f"{seed}\0{identity}".encode()).digest()
    return bytearray(hashlib.shake_256(key).digest(count))
