"""Export a plain ``nn.Module``, look at the plan, rotate it, and see that it still computes the same."""

import torch
from decoder import VOCABULARY, export_decoder

import spinpass

program = export_decoder()

# The plan says what would be rotated, and what is left alone and why. It reads no weight.
plan = spinpass.plan(program)
print(plan)

# A new program: the same inputs, outputs, dtypes and dynamic shapes. It is certified before it is returned.
rotated = spinpass.transform(program, plan=plan)

# The certificate compares any two programs, here once more from outside.
certificate = spinpass.verify(program, rotated)
print(certificate)
certificate.raise_if_failed()

ids = torch.randint(VOCABULARY, (1, 12))  # another batch and length than the program was exported with
difference = (rotated.module()(ids) - program.module()(ids)).abs().max()
print(f"max |difference of the logits| in float32: {difference:.1e}")
