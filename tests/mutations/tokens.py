"""Tokens that are added, dropped, chosen, mixed and pooled: the axes beside the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import BATCH, HIDDEN, SEQ, RMSNorm, tokens


class SoftPrompt(Hazard):
    """Learned tokens in front, dropped again at the end."""

    folds = True

    def prepare(self) -> None:
        self.prompt = param(3, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prompt[None].expand(ids.shape[0], -1, -1), self.embed(ids)], 1)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x[:, 3:]))


class VisionTokens(Hazard):
    """Features of another width take the places of some tokens."""

    folds = True

    def prepare(self) -> None:
        self.project = nn.Linear(9, HIDDEN)

    def forward(self, ids: Tensor, pixels: Tensor, image: Tensor) -> Any:
        x = torch.where(image[..., None], self.project(pixels), self.embed(ids))
        return self.finish(self.blocks[0](x))

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, SEQ, 9, dtype=torch.float64), torch.arange(SEQ).expand(BATCH, -1) < 2


class ScatteredFeatures(Hazard):
    """Features written over tokens at given places."""

    def prepare(self) -> None:
        self.project = nn.Linear(9, HIDDEN)

    def forward(self, ids: Tensor, pixels: Tensor) -> Any:
        x = self.embed(ids)
        mask = torch.zeros(BATCH, SEQ, 1, dtype=torch.bool)
        mask[:, :2] = True
        x = x.masked_scatter(mask, self.project(pixels))
        return self.finish(self.blocks[0](x))

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, 2, 9, dtype=torch.float64)


class MixtureOfDepths(Hazard):
    """A router picks the tokens that go through the MLP; the results are added where they came from."""

    def prepare(self) -> None:
        self.router = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        weight, at = self.router(x)[..., 0].topk(2, 1)
        at = at.sort(1)[0]
        rows = at[..., None].expand(-1, -1, HIDDEN)
        picked = x.gather(1, rows)
        y = self.blocks[layer].mlp(self.blocks[layer].norm2(picked)) * weight[..., None]
        return x.scatter_add(1, rows, y)


class IndexAdded(Hazard):
    """The same for a flattened batch with index_select and index_add."""

    def prepare(self) -> None:
        self.register_buffer("rows", torch.tensor([0, 3, 7]))

    def between(self, x: Tensor, layer: int) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        y = self.blocks[layer].mlp(self.blocks[layer].norm2(flat.index_select(0, self.rows)))
        return flat.index_add(0, self.rows, y).view_as(x)


class LastToken(Hazard):
    """Logits of the last token alone, and of a given token of each row."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        at = x[torch.arange(BATCH), torch.tensor([3, 1])]
        return self.head(self.norm(x[:, -1])), self.head(self.norm(at))


class Pooled(Hazard):
    """Mean and masked sum over tokens, into a classifier."""

    folds = True

    def prepare(self) -> None:
        self.classify = nn.Linear(HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        mask = (torch.arange(SEQ) < 4).to(x.dtype)[None, :, None]
        return super().finish(x), self.classify(x.mean(1)), self.classify((x * mask).sum(1) / mask.sum(1))


class MaxPooled(Hazard):
    """The largest over tokens of each channel, behind the norm."""

    def prepare(self) -> None:
        self.classify = nn.Linear(HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return self.head(h), self.classify(h.max(1).values)


class Windows(Hazard):
    """Tokens in windows that are shifted and mixed within (Swin): pad, roll, view, permute and back."""

    def prepare(self) -> None:
        self.mix = param(3, 3)

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = F.pad(self.norm(x), (0, 0, 0, 1)).roll(1, 1)
        y = torch.einsum("bwsd,st->bwtd", y.view(BATCH, 2, 3, HIDDEN), self.mix).reshape(BATCH, 6, HIDDEN)
        return x + self.blocks[layer].mlp(y.roll(-1, 1)[:, :SEQ])


class TokensReversed(Hazard):
    """A backward pass over the tokens beside the forward one."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.blocks[layer].attn(self.blocks[layer].norm1(x).flip(1)).flip(1)


class PooledThenRepeated(Hazard):
    """Tokens averaged in pairs, processed, and repeated (hourglass)."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        pairs = x[:, :4].unflatten(1, (2, 2)).mean(2)
        up = self.blocks[layer].mlp(self.blocks[layer].norm2(pairs)).repeat_interleave(2, 1)
        return torch.cat([x[:, :4] + up, x[:, 4:]], 1)


class SequenceFirst(Hazard):
    """The stream is kept as (seq, batch, channels) and flattened for the MLP."""

    folds = True

    def forward(self, ids: Tensor) -> Any:
        b = self.blocks[0]
        x = self.embed(ids.t())
        x = x + b.attn(b.norm1(x).transpose(0, 1)).transpose(0, 1)
        flat = x.reshape(-1, HIDDEN)
        flat = flat + b.mlp(b.norm2(flat))
        return self.finish(flat.view_as(x).permute(1, 0, 2))


class ChannelsFirst(Hazard):
    """The stream is kept as (batch, channels, seq), norms taken over axis 1, linears spelled as convolutions."""

    def prepare(self) -> None:
        self.g, self.up, self.down = param(HIDDEN, 1), nn.Conv1d(HIDDEN, 40, 1), nn.Conv1d(40, HIDDEN, 1)

    def forward(self, ids: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids)).transpose(1, 2)
        h = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.g
        x = x + self.down(F.gelu(self.up(h)))
        return self.finish(x.transpose(1, 2))


class TokenMixing(Hazard):
    """Constant matrices mix tokens (MLP-Mixer, causal Toeplitz): no rotation of channels notices."""

    folds = True

    def prepare(self) -> None:
        self.w1, self.w2, self.lower = param(7, SEQ), param(SEQ, 7), param(SEQ, SEQ)
        self.mn = RMSNorm(HIDDEN, weight=False)

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x + self.w2 @ (self.w1 @ self.mn(x))
        return x + torch.matmul(self.lower.tril(), self.mn(x))


class TokenMixingNonlinear(Hazard):
    """A nonlinearity between two mixings of tokens acts on the channels too."""

    reason = "the same value to all channels"

    def prepare(self) -> None:
        self.w1, self.w2 = nn.Linear(SEQ, 7), nn.Linear(7, SEQ)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.w2(F.gelu(self.w1(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class Fourier(Hazard):
    """Tokens and channels are mixed by a Fourier transform (FNet)."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + torch.fft.fft(torch.fft.fft(self.norm(x), dim=-1), dim=1).real


class PaddedAndUnpadded(Hazard):
    """Padding is removed from a flattened batch and put back (variable length)."""

    folds = True

    def prepare(self) -> None:
        self.register_buffer("kept", torch.tensor([0, 1, 2, 5, 6, 7, 8]))

    def between(self, x: Tensor, layer: int) -> Tensor:
        packed = x.flatten(0, 1)[self.kept]
        packed = packed + self.blocks[layer].mlp(self.blocks[layer].norm2(packed))
        out = torch.zeros(BATCH * SEQ, HIDDEN, dtype=x.dtype)
        return out.index_put((self.kept,), packed).view_as(x)
