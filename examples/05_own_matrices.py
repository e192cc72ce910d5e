"""Rotation matrices of your own, for one rotation or for one space, and other settings for some spaces."""

import torch
from decoder import HEAD, HIDDEN, export_decoder

import spinpass

program = export_decoder()
learned, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64))
per_head, _ = torch.linalg.qr(torch.randn(HEAD, HEAD, dtype=torch.float64))

config = spinpass.RotationConfig(
    matrices={"R1": learned, "R2:layers.0": per_head},
    overrides={"R4": spinpass.Override(kind="random-hadamard", block_size=16, seed=7)},
)
plan = spinpass.plan(program, config)
for space in plan.spaces:
    print(f"{space.name:16} {space.rotation}")
rotated = spinpass.transform(program, plan=plan)
print(spinpass.verify(program, rotated).verdict)

# A matrix that is not orthogonal would change the function; it is turned down.
try:
    spinpass.plan(program, spinpass.RotationConfig(matrices={"R1": learned + 0.01}))
except spinpass.ConfigError as error:
    print("refused:", error)
