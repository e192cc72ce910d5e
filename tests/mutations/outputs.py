"""What the program returns beside its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard
from tests.support.decoders import HIDDEN


class ReturnsContext(Hazard):
    """Attention's result is an output."""

    reason = "a program output"
    missing = "R2"

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        c = a.mixed(q, k, v)
        return (self.head(self.norm(x + a.o(c.transpose(1, 2).flatten(2)))), c)


class ReturnsQ(Hazard):
    """Queries, keys and values are outputs."""

    reason = "a program output"

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        c = a.mixed(q, k, v)
        return (self.head(self.norm(x + a.o(c.transpose(1, 2).flatten(2)))), q, k, v)


class Slice(Hazard):
    """Channels of the stream are an output."""

    reason = "cuts through the axis"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x[..., :5])


class OutputStream(Hazard):
    """The stream is an output."""

    reason = "a program output"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x)


class MeanOut(Hazard):
    """The mean over channels is an output."""

    reason = "its mean over the channels is used"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.mean(-1))


class SelfDot(Hazard):
    """Gram matrix of tokens."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x @ x.transpose(1, 2))


class SelfOuter(Hazard):
    """Gram matrix of channels."""

    reason = "a program output"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.transpose(1, 2) @ x)


class CosineSim(Hazard):
    """Cosine similarity."""

    reason = "aten::cosine_similarity does not"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1))


class Dist(Hazard):
    """Distances and norms."""

    reason = "aten::cdist does not"

    def finish(self, x: Tensor) -> Any:
        return (
            self.head(self.norm(x)),
            (x[:, 1:] - x[:, :-1]).pow(2).sum(-1),
            torch.cdist(x, x),
            x.norm(dim=-1),
            x.norm(p=1, dim=-1),
            x.norm(),
        )


class ArgmaxC(Hazard):
    """Argmax over channels."""

    reason = "aten::argmax does not"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.argmax(-1))


class TopkC(Hazard):
    """Top channels."""

    reason = "aten::topk does not"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.topk(3, -1)[0])


class ShapeOnly(Hazard):
    """Values that take only the shape."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.ones_like(x), torch.full_like(x, 3.0), torch.zeros_like(x))


class MixedDtype(Hazard):
    """Parts in other dtypes."""

    def prepare(self) -> None:
        self.vh = nn.Linear(HIDDEN, 3)
        self.vh2 = nn.Linear(HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.vh2(torch.tanh(x)).float(), torch.tanh(x.float()), x.half())


class SoftmaxC(Hazard):
    """Statistics over channels."""

    reason = "aten::softmax does not"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.softmax(-1), x.std(-1), x.var(-1), x.max(), x.sum())
