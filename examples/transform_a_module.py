"""A plain nn.Module: export, look at the plan, rotate, verify, and run the result."""

import torch
from decoder import VOCABULARY, export_decoder

import spinpass

program = export_decoder()
plan = spinpass.plan(program)
print(plan)

rotated = spinpass.transform(program, plan=plan)  # certified before it is returned: the decoder is small
certificate = spinpass.verify(program, rotated)  # and once more, as stored
print(certificate)
certificate.raise_if_failed()

ids = torch.randint(VOCABULARY, (1, 12))  # another batch and length: shapes stay dynamic
difference = (rotated.module()(ids) - program.module()(ids)).abs().max()
print(f"max |difference of the logits| in float32: {difference:.1e}")
