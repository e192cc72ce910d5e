"""One block of a tiny decoder as the analysis sees it: by axis of each weight and value the space that it is in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from spinpass import RotationConfig
from spinpass.analysis import find_attention, find_linears, normed_value, root_of
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import PassRunner
from spinpass.pipeline import PASSES
from spinpass.planning import PlannedSpace, Planner, Site

VOCABULARY, HIDDEN, MLP, HEADS, KV_HEADS, HEAD = 96, 48, 80, 4, 2, 16


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor.

    Attributes:
        size: its size; where it is dynamic, ``b`` for the batch and ``t`` for the tokens.
        role: the rotation whose space it is in; empty where it is in none.
        count: how many vectors of the space lie side by side on it.
    """

    size: str
    role: str = ""
    count: int = 1

    @property
    def label(self) -> str:
        """What stands in the cell of the axis: its type, or its size where it has none."""
        if not self.role:
            return self.size
        return self.role if self.count == 1 else f"{self.count}×{self.role}"


@dataclass(frozen=True)
class Block:
    """What the pictures of a block are drawn from.

    Attributes:
        tensors: the axes of weights by the layer's name (``q_proj``), and of values by what they are (``q_proj input``,
            ``q_proj result``, ``query``).
        online: the role of the Hadamard behind which a value lies, for values that have one.
        scaled: the weights that take up the scale of the norm in front of them.
        spaces: what was decided, one for each role.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    online: Mapping[str, str]
    scaled: Collection[str]
    spaces: Mapping[str, PlannedSpace]


def read_block(config: RotationConfig) -> Block:
    """Plan the rotations of a decoder of one block and read off which axis is in which space."""
    runner = PassRunner(tiny_decoder())
    editor = runner.editor
    nodes = _named_nodes(editor)
    dynamic = dict(zip(map(str, shape(editor.user_inputs()[0])), ("b", "t")))
    tensors = {name: [Axis(dynamic.get(str(size), str(size))) for size in shape(node)] for name, node in nodes.items()}
    online: dict[str, str] = {}
    scaled: set[Node] = set()
    spaces: dict[str, PlannedSpace] = {}
    planner = Planner(editor, config)
    for edit in planner.edits():
        assert isinstance(edit, Site), "this decoder has no tied table"
        role, space = edit.planned.role, edit.space
        spaces[role] = edit.planned
        scaled |= {use.node for use in space.constants if use.type.pending is not None}
        entered = {root_of(entry.node) for entry in space.entries}
        for name, node in nodes.items():
            if root_of(node) in entered:
                online[name] = role
            for layout in (each.layout for each in space.members.get(node, ())):
                for dim in layout.mixing:
                    tensors[name][dim] = Axis(tensors[name][dim].size, role, layout.count)
        for each in PASSES:
            space = runner.run(each, space, edit.planned.rotation, edit.name)
        planner.applied(edit)
    scales = {name for name, node in nodes.items() if node in scaled}
    return Block({name: tuple(axes) for name, axes in tensors.items()}, online, scales, spaces)


def _named_nodes(editor: ProgramEditor) -> dict[str, Node]:
    """Return the weights, what each reads and returns, and what lies between, by the names of :class:`Block`."""
    linears = {editor.fqn(each.weight).split(".")[-2]: each for each in find_linears(editor)}
    attention = find_attention(editor)[0]
    table = next(node for node in editor.nodes if editor.is_constant(node) and "embed" in node.name)
    nodes = {"embed_tokens": table, "query": attention.query, "key": attention.key, "value": attention.value}
    for name, linear in linears.items():
        nodes |= {name: linear.weight, f"{name} input": linear.operand, f"{name} result": linear.node}
    for name, reader in (("stream", "q_proj"), ("middle", "gate_proj"), ("final", "lm_head")):
        normed = normed_value(editor, root_of(linears[reader].operand))
        assert normed is not None, "a norm stands in front of it"
        nodes[name] = normed
    return nodes | {"attention result": attention.node}


@cache
def tiny_decoder() -> ExportedProgram:
    """A decoder of one block with random weights, its sizes pairwise different; batch and tokens are dynamic."""
    import transformers

    settings: Any = dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=1, head_dim=HEAD,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (), {"input_ids": torch.ones(2, 7, dtype=torch.long), "use_cache": False},
            dynamic_shapes={"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}, strict=False,
        )  # fmt: skip
