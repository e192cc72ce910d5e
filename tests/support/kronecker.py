"""Kronecker factors of the sizes of Hadamards, as learning makes them, for tests of runtimes."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig
from spinpass.rotations import hadamard


def by_factors(program: ExportedProgram, config: RotationConfig) -> dict[str, Rotation]:
    """Random invertible factors for every space of the program that admits them and is a Hadamard otherwise."""
    return {
        space.name: _factors(space.size, seed)
        for seed, space in enumerate(spinpass.plan(program, config).spaces)
        if space.group == "invertible" and space.rotation.order == space.size
    }


def _factors(size: int, seed: int) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for f in hadamard.kronecker_factors(size):
        turned, _ = torch.linalg.qr(torch.randn(f, f, generator=generator, dtype=torch.float64))
        made.append(turned * (0.3 * torch.randn(f, generator=generator, dtype=torch.float64)).exp())
    return Rotation.from_factors(made)
