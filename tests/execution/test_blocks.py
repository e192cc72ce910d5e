"""Blocks: a decoder is cut between its layers, and run block by block it computes what it does as a whole."""

from __future__ import annotations

import pytest
import torch

from spinpass.execution import block_run, blocks_of, flat_inputs, read_constants, run
from tests.support import models
from tests.support.programs import program

LAYERS = 4


def deep() -> torch.export.ExportedProgram:
    return models.export_plain(models.build("llama", num_hidden_layers=LAYERS), dynamic=True)


def matrices_of(ep: torch.export.ExportedProgram) -> set[str]:
    read = {node.name for node in ep.graph.nodes if node.op == "placeholder" and node.users}
    state = {spec.arg.name: ep.state_dict.get(str(spec.target)) for spec in ep.graph_signature.input_specs}
    return {name for name, tensor in state.items() if tensor is not None and tensor.ndim == 2 and name in read}


@pytest.mark.parametrize("name", ["deep", "llama_tied", "gpt2", "qwen3", "phi3", "gemma2"])
def test_blocks_compute_what_the_program_does(name: str) -> None:
    ep = deep() if name == "deep" else program(name)
    inputs = flat_inputs(ep, ep.example_inputs)
    matrices = matrices_of(ep)
    found = blocks_of(ep, inputs, matrices, 6, {node.name for node in ep.graph.nodes})
    nodes = {node.name: node for node in ep.graph.nodes}
    given = {nodes[key]: value for key, value in inputs.items()}
    read: list[str] = []
    here = dict(given)
    for living in found:
        own = read_constants(ep, here, living) & matrices
        read += sorted(own - set(read))
        assert len(own) >= 6 or living is found[-1]
        here = given | block_run(ep, here, living, {})
    assert set(read) == matrices
    torch.testing.assert_close(here[found[-1][0]], run(ep, ep.example_inputs)[0])
    if name == "deep":
        assert len(found) == LAYERS, "one for each layer; the first has the table, the last the head"
        residual = [[n for n in living if getattr(n.meta["val"], "shape", ())[-1:] == (models.HIDDEN,)] for living in found[:-1]]
        assert all(len(each) == 1 for each in residual)


def test_only_what_the_other_program_knows_lives_between_two_blocks() -> None:
    ep = deep()
    inputs = flat_inputs(ep, ep.example_inputs)
    matrices = matrices_of(ep)
    assert len(blocks_of(ep, inputs, matrices, 6, set())) == 1
    assert len(blocks_of(ep, inputs, matrices, 10**6, {n.name for n in ep.graph.nodes})) == 1
