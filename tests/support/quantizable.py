"""Small decoders to quantize, inputs to calibrate on, and how far a quantized program is off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass import RotationConfig, transform
from spinpass.evaluation import ProgramScorer, compare
from spinpass.execution.interpreter import run
from spinpass.quantization import quantize
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made, with_outliers

ROWS = 64  # of the table of Layers


class Layers(nn.Module):
    """A table, two linears of which one has an odd width, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up = nn.Embedding(ROWS, 96), nn.Linear(96, 160)
        self.down, self.head = nn.Linear(160, 96, bias=False), nn.Linear(96, ROWS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


def export(model: torch.nn.Module) -> ExportedProgram:
    return exported(model, dynamic_shapes={"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})


@cache
def program() -> ExportedProgram:
    return export(made(Decoder(layers=2), dtype=torch.float32))


@cache
def outlying() -> ExportedProgram:
    """The same with two channels of the stream far above the others, as language models have them."""
    model = with_outliers(made(Decoder(layers=2), dtype=torch.float32))
    return export(model)


def inputs(count: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, VOCAB, (2, SEQ), generator=generator),) for _ in range(count)]


def nodes(ep: ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [n for n in ep.graph.nodes if str(n.target).startswith(f"spinpass.{name}")]


def divergences(ep: ExportedProgram, configs: Sequence[RotationConfig], scheme: str) -> list[float]:
    """How far a scheme takes predictions off in each basis, in nats per token of six windows."""
    windows = [torch.randint(0, 30, (24,), generator=torch.Generator().manual_seed(s)).tolist() for s in range(6)]
    scorer = ProgramScorer(ep)
    rounded = (quantize(transform(ep, config), scheme).program for config in configs)
    return [compare(scorer, ProgramScorer(each), windows).divergence for each in rounded]


def error(before: ExportedProgram, after: ExportedProgram) -> float:
    pairs = [(run(before, x)[0], run(after, x)[0]) for x in inputs(3)]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
