"""Heads beside the head, and models that return more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, merged
from tests.support.decoders import FFN, HEAD, HEADS, HIDDEN, VOCAB, Attention, Block, RMSNorm, Shape, rope


class AllHiddenStates(Hazard):
    """Every layer's stream and every norm's output are outputs, in a dictionary."""

    shape = Shape(layers=2)
    reason = "a program output"

    def forward(self, ids: Tensor) -> Any:
        seen = [self.embedded(ids)]
        for block in self.blocks:
            seen.append(block(seen[-1]))
        h = self.norm(seen[-1])
        return {"logits": self.head(h), "hidden_states": tuple(seen), "last": h}


class ExitEverywhere(Hazard):
    """Logits of every layer through one norm and head, once without the norm."""

    folds = True
    shape = Shape(layers=2, tied=True)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        exits = []
        for block in self.blocks:
            x = block(x)
            exits += [self.head(self.norm(x)), self.head(x)]
        return exits


class ReadersEverywhere(Hazard):
    """A linear reader at every point of the model: raw stream, branches, norms, queries, context, MLP."""

    folds = True

    def prepare(self) -> None:
        self.probes = nn.ModuleList(nn.Linear(n, 2) for n in [HIDDEN] * 6 + [HEADS * HEAD] * 2 + [FFN])

    def forward(self, ids: Tensor) -> Any:
        b, x = self.blocks[0], self.embedded(ids)
        h = b.norm1(x)
        q, k, v = b.attn.project(h)
        context = merged(b.attn.mixed(rope(q), rope(k), v))
        y = b.attn.o(context)
        x2 = x + y
        h2 = b.norm2(x2)
        inner = F.silu(b.mlp.gate(h2)) * b.mlp.up(h2)
        x3 = x2 + b.mlp.down(inner)
        probed = zip(self.probes, (x, h, y, x2, h2, x3, merged(q), context, inner), strict=True)
        return self.finish(x3), [probe(value) for probe, value in probed]


class NextTokenHeads(Hazard):
    """Multi-token prediction: norms of stream and next embedding side by side, a block, the shared head."""

    def prepare(self) -> None:
        self.nh, self.ne, self.join = RMSNorm(HIDDEN), RMSNorm(HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.more = Block(self.s)

    def forward(self, ids: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        following = self.embed(ids[:, 1:])
        y = self.join(torch.cat([self.nh(x[:, :-1]), self.ne(following)], -1))
        return self.finish(x), self.finish(self.more(y))


class Medusa(Hazard):
    """Heads with a residual block each on the last norm's output."""

    def prepare(self) -> None:
        self.extra = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return [self.head(h)] + [self.head(h + F.silu(e(h))) for e in self.extra]


class RewardHead(Hazard):
    """A head of one number on the last token's raw stream, an MLP head on the normed one, no logits."""

    folds = True

    def prepare(self) -> None:
        self.reward, self.inner, self.outer = nn.Linear(HIDDEN, 1, bias=False), nn.Linear(HIDDEN, 9), nn.Linear(9, 1)

    def finish(self, x: Tensor) -> Any:
        return self.reward(x[:, -1])[:, 0], self.outer(torch.tanh(self.inner(self.norm(x)[:, 0])))


class Loss(Hazard):
    """The loss and the labels' log-probabilities are outputs, the logits are not."""

    folds = True

    def forward(self, ids: Tensor) -> Any:
        logits = self.head(self.norm(self.blocks[0](self.embedded(ids))))[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), chosen, logits.argmax(-1)


class SameOutputTwice(Hazard):
    """The stream stands in the outputs twice, and a view of it, and an input."""

    reason = "a program output"

    def forward(self, ids: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        return self.finish(x), x, x, x.flatten(0, 1), ids, x.detach()


class AttentionsOut(Hazard):
    """Scores before and after the softmax are outputs."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def finish(self, x: Tensor) -> Any:
        q, k, v = self.a2.project(self.norm(x))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = rope(q) @ rope(k).transpose(2, 3)
        weights = scores.softmax(-1)
        return self.head(self.norm(x + self.a2.o(merged(weights @ v)))), scores, weights


class KeysBeforeRotation(Hazard):
    """Keys before their positions, and values, are outputs in the layout of the projection."""

    reason = "R2 at .*a program output"

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        y = a.o(merged(a.mixed(rope(q), rope(k), v)))
        return self.head(self.norm(x + y)), merged(k), merged(v)


class ContrastiveHead(Hazard):
    """A sentence vector: mean over tokens, projected, of unit length."""

    def prepare(self) -> None:
        self.project = nn.Linear(HIDDEN, 7)

    def finish(self, x: Tensor) -> Any:
        return F.normalize(self.project(self.norm(x).mean(1)), dim=-1)


class TableOut(Hazard):
    """The table itself is an output."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x)), self.embed.weight


class ValueHead(Hazard):
    """A second head on the raw stream."""

    folds = True

    def prepare(self) -> None:
        self.vh = nn.Linear(HIDDEN, 1)

    def finish(self, x: Tensor) -> Any:
        return (super().finish(x), self.vh(x))


class EarlyExit(Hazard):
    """A nonlinear head on the raw stream."""

    reason = "aten::tanh does not commute"

    def prepare(self) -> None:
        self.e = nn.Linear(HIDDEN, VOCAB)

    def between(self, x: Tensor, layer: int) -> Tensor:
        if layer == 0:
            self.early = self.e(torch.tanh(x))
        return x

    def finish(self, x: Tensor) -> Any:
        return (super().finish(x), self.early)
