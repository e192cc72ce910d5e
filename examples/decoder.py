"""A small decoder in plain PyTorch, for the other examples: pre-norm, grouped heads, rotary positions, gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, HIDDEN, FFN, HEADS, KV_HEADS, HEAD = 200, 48, 80, 4, 2, 16


def rotary(x: Tensor) -> Tensor:
    """Half-split rotary positions on (batch, heads, length, head)."""
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.o = nn.Linear(HIDDEN, HEADS * HEAD), nn.Linear(HEADS * HEAD, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD), nn.Linear(HIDDEN, KV_HEADS * HEAD)
        self.gate, self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # as after training: folding a scale of one proves nothing

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def export_decoder(model: Decoder | None = None) -> torch.export.ExportedProgram:
    """A decoder as an exported program, batch and length dynamic; one with random weights unless it is given."""
    torch.manual_seed(0)
    axes = {"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    return torch.export.export((model or Decoder()).eval(), (torch.randint(VOCABULARY, (2, 7)),), dynamic_shapes=axes)
