"""Hypothesis puts hazards together: any norm, layout and table, under any hazards at the embedding, between layers and at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.mutations.caches import Cached, CatCache, StaticCache, StaticCacheInPlace, WindowCache
from tests.mutations.hazard import Hazard, SecondAttention
from tests.mutations.oracle import check, steps
from tests.mutations.registry import ALL
from tests.support.decoders import NORMS, Attention, Decoder, Shape, exported, made, rope

CACHES: dict[str, type[Cached]] = {c.__name__: c for c in (CatCache, StaticCache, StaticCacheInPlace, WindowCache)}
# hazards whose parts need each other, inputs of their own, another number of tokens or a wider bound
WHOLE = {"EarlyExit", "Concat", "ConcatRaw", "AdaptiveNorm", "AdaptiveByToken", "SoftPrompt", "LowerPrecision"}


def having(part: str) -> list[str]:
    """Hazards that define this part of a decoder and leave its forward alone."""
    plain = {getattr(c, part) for c in (Decoder, Hazard)}
    return [
        name for name, c in ALL.items()
        if c.forward is Decoder.forward and getattr(c, part) not in plain and name not in WHOLE
        and (c.mix is not SecondAttention.mix if issubclass(c, SecondAttention) and c.between is SecondAttention.between else True)
    ]  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """All choices, by name: what hypothesis prints where one fails."""

    shape: Shape
    embedded: str | None
    between: tuple[str, ...]
    finish: str | None
    cache: str | None


class Composed(Decoder):
    """A decoder with one hazard's embedding, several hazards after each layer, one hazard's end, and a layer with a cache."""

    def __init__(self, choice: Composition) -> None:
        super().__init__(choice.shape)
        self.choice = choice
        self.first = self.part(choice.embedded)
        self.twists = torch.nn.ModuleList(self.part(name) for name in choice.between)
        self.last = self.part(choice.finish)
        if choice.cache:
            self.decode, self.update = Attention(choice.shape), CACHES[choice.cache]()

    def part(self, name: str | None) -> Any:
        """The hazard with this decoder's norms, biases and, where it is tied, its table."""
        if name is None:
            return None
        hazard = ALL[name]
        s, own = self.s, hazard.shape
        norm = s.norm if own.norm == "rms" else own.norm
        made_of = type(name, (hazard,), {"shape": replace(own, norm=norm, bias=s.bias or own.bias)})()
        if s.tied:
            made_of.head.weight = made_of.embed.weight = self.embed.weight
        return made_of

    def forward(self, ids: Tensor, keys: Tensor | None = None, values: Tensor | None = None) -> Any:
        x = self.first.embedded(ids) if self.first is not None else self.embedded(ids)
        for block in self.blocks:
            x = block(x)
            for twist in self.twists:
                x = twist.between(x, 0)
        kept: Any = ()
        if self.choice.cache:
            q, k, v = self.decode.project(self.norm(x))
            kept, k, v = self.update.joined(keys, values, rope(k), v)
            x = x + self.decode.o(self.update.attend(rope(q), k, v))
        return (self.last if self.last is not None else self).finish(x), kept

    def inputs(self) -> tuple[Any, ...]:
        cache = self.choice.cache
        return CACHES[cache].inputs() if cache else Hazard.inputs()


SHAPES = st.builds(
    Shape,
    norm=st.sampled_from(sorted(NORMS)),
    bias=st.booleans(),
    tied=st.booleans(),
    parallel=st.booleans(),
    post_norm=st.booleans(),
    qkv=st.sampled_from(["split", "fused", "grouped"]),
    gate_up=st.sampled_from(["split", "fused"]),
    qk_norm=st.booleans(),
    spelled=st.booleans(),
    positions=st.booleans(),
    layers=st.sampled_from([1, 2]),
)
COMPOSITIONS = st.builds(
    Composition,
    shape=SHAPES,
    embedded=st.none() | st.sampled_from(having("embedded")),
    between=st.lists(st.sampled_from(having("between")), min_size=1, max_size=3, unique=True).map(tuple),
    finish=st.none() | st.sampled_from(having("finish")),
    cache=st.none() | st.sampled_from(sorted(CACHES)),
)
SETTINGS = st.fixed_dictionaries(
    dict(
        form=st.sampled_from(["auto", "offline", "online"]),
        tied=st.sampled_from(["keep", "untie"]),
        kind=st.sampled_from(["hadamard", "random-hadamard", "random-matrix"]),
        cache=st.sampled_from(["rotated", "plain"]),
    )
)
MODES = st.sampled_from(["plain", "plain", "functional", "decomposed"])
COMMON: dict[str, Any] = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)


def exact(choice: Composition, setting: dict[str, Any], mode: str) -> None:
    model = Composed(choice)
    note(f"{choice}\n{setting} {mode}")
    args = model.inputs()
    program = exported(made(model), args)
    if mode != "plain":
        program = program.run_decompositions({}) if mode == "functional" else program.run_decompositions()
    check(program, steps(program, args), args, {"R1", "R2", "R3", "R4"}, **setting)


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate), derandomize=True, **COMMON)
@given(choice=COMPOSITIONS, setting=SETTINGS, mode=MODES)
def test_hazards_put_together(choice: Composition, setting: dict[str, Any], mode: str) -> None:
    exact(choice, setting, mode)


@pytest.mark.slow
@settings(max_examples=300, **COMMON)
@given(choice=COMPOSITIONS, setting=SETTINGS, mode=MODES)
def test_many_hazards_put_together(choice: Composition, setting: dict[str, Any], mode: str) -> None:
    exact(choice, setting, mode)


def test_there_is_much_to_choose_from() -> None:
    assert len(having("between")) >= 120 and len(having("finish")) >= 40 and len(having("embedded")) >= 10
