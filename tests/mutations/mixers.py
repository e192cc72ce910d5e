"""Several streams, and mixers of tokens that are not attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, SEQ, VOCAB, Block, RMSNorm, Shape


class TwoStreams(Hazard):
    """Other stream of same width, mixes at the end by product."""

    reason = "aten::sigmoid does not"

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, HIDDEN)
        self.b2 = Block(self.s)
        self.n2 = RMSNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        y = self.b2(self.e2.weight[:SEQ][None] + 0 * x)
        return self.head(self.norm(x) * torch.sigmoid(self.n2(y)))


class TwoStreams2(Hazard):
    """Two streams that never meet, a layer applied twice."""

    folds = True

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, HIDDEN)
        self.b2 = Block(self.s)
        self.n2 = RMSNorm(HIDDEN)
        self.h2 = nn.Linear(HIDDEN, 7)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        y = self.b2(self.b2(self.e2(ids)))
        x = self.blocks[0](x)
        return (self.head(self.norm(x)), self.h2(self.n2(y)))


class HyperConn(Hazard):
    """Several copies of stream mixed."""

    missing = "R1 R2 R3"

    def prepare(self) -> None:
        self.mx = param(3, 3)
        self.al = param(3)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids)[:, :, None].expand(-1, -1, 3, -1)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        b = self.blocks[0]
        y = torch.einsum("bsnd,n->bsd", x, self.al)
        y = b.mlp(b.norm2(y))
        x = torch.einsum("bsnd,nm->bsmd", x, self.mx) + y[:, :, None]
        return self.head(self.norm(x.sum(2)))


class HyperConnections(Hazard):
    """Four residual streams, read, written and mixed by small matrices that the streams compute (hyper-connections)."""

    folds = True
    shape = Shape(layers=2)

    def prepare(self) -> None:
        self.fixed, self.read, self.write = param(4, 4), param(4), param(4)
        self.by_stream, self.mn = nn.Linear(HIDDEN, 4), RMSNorm(HIDDEN)

    def step(self, x: Tensor, branch: Any) -> Tensor:
        h = self.mn(x)
        read = torch.tanh(self.by_stream(h)).mean(-1) + self.read
        mixing = (self.fixed + torch.tanh(self.by_stream(h))).softmax(-1)
        y = branch(torch.einsum("bsnd,bsn->bsd", x, read))
        return torch.einsum("bsnd,bsnm->bsmd", x, mixing) + self.write[:, None] * y[:, :, None]

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)[:, :, None].repeat(1, 1, 4, 1)
        for b in self.blocks:
            x = self.step(x, lambda z, b=b: b.attn(b.norm1(z)))
            x = self.step(x, lambda z, b=b: b.mlp(b.norm2(z)))
        return self.finish(x.sum(2))


class StaticHyperConnections(Hazard):
    """The same with constant matrices and the streams in front."""

    folds = True

    def prepare(self) -> None:
        self.mixing, self.read, self.write = param(4, 4), param(4), param(4)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)[None].expand(4, -1, -1, -1)
        b = self.blocks[0]
        for norm, branch in ((b.norm1, b.attn), (b.norm2, b.mlp)):
            y = branch(norm(torch.einsum("nbsd,n->bsd", x, self.read)))
            x = torch.einsum("nbsd,nm->mbsd", x, self.mixing) + torch.einsum("bsd,n->nbsd", y, self.write)
        return self.finish(x.mean(0))


class TwoWidths(Hazard):
    """An encoder stream of another width whose layers alternate with the decoder's, both ways."""

    shape = Shape(layers=2)

    def prepare(self) -> None:
        self.wide = Block(Shape(hidden=16, ffn=20, norm="ln", bias=True))
        self.down, self.up, self.n16 = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN), nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        y = self.wide(self.down(x))
        x = self.blocks[1](x + self.up(self.n16(y)))
        y = self.wide(y + self.down(self.norm(x)))
        return self.finish(x), self.n16(y)
