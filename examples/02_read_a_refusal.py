"""What cannot be rotated exactly is refused, with the reason, and nothing is changed."""

import torch
from decoder import VOCABULARY, Decoder
from torch import Tensor, nn

import spinpass


class WithSteering(Decoder):
    """A decoder that clips its residual stream: a nonlinearity per channel, so no rotation commutes with it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x).clamp(-3, 3)
        logits: Tensor = self.head(self.norm(x))
        return logits


ids = torch.randint(VOCABULARY, (2, 7))

# R1 does not close everywhere. `auto` there rotates at the linears' inputs instead and says why.
plan = spinpass.plan(torch.export.export(WithSteering().eval(), (ids,)))
for refusal in plan.refusals:
    print("refused:", refusal)
print("R1 is", {space.form for space in plan.spaces if space.role == "R1"})

# A program in which nothing can be rotated is an error that lists every reason.
classifier = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Softmax(-1)).eval()
try:
    spinpass.transform(torch.export.export(classifier, (torch.randn(2, 16),)))
except spinpass.RefusedError as error:
    print(error)
