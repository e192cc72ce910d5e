"""Programs that are moved: constants, what the graph makes and what is recorded of it, and devices that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass import record
from spinpass.errors import ConfigError
from spinpass.graph import (
    Handle,
    Held,
    device_of,
    devices,
    moved,
    named_device,
    on_device,
    storage_key,
    with_other_values,
)

META = torch.device("meta")  # it has no memory, and every machine has it


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that tests can move programs to."""
    known = devices.named_device
    monkeypatch.setattr(devices, "named_device", lambda name: name if name == META else known(name))
    return META


class Positions(nn.Module):
    """Makes positions itself, casts to a device, runs under autocast, and has a tied table and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids + torch.arange(ids.shape[1])) * self.scale.to("cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x)  # type: ignore[no-any-return]


def program() -> ExportedProgram:
    return torch.export.export(Positions().eval(), (torch.zeros(2, 3, dtype=torch.int64),))


def recorded(ep: ExportedProgram) -> set[str]:
    vals = [node.meta.get("val") for module in ep.graph_module.modules() for node in module.graph.nodes]  # type: ignore[union-attr,operator]
    return {val.device.type for val in vals if isinstance(val, Tensor)}


def named(ep: ExportedProgram) -> set[Any]:
    """Every device that some graph of a program names."""
    found: set[Any] = set()
    for module in ep.graph_module.modules():
        for node in module.graph.nodes:  # type: ignore[union-attr,operator]
            given = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
            found.update(each.type for each in given if isinstance(each, torch.device))
            found.update(each for each in given if each in ("cpu", "meta", "cuda"))
    return found


def test_all_of_a_program_is_moved(meta: torch.device) -> None:
    before = program()
    after = on_device(before, meta)
    assert device_of(before).type == "cpu" and recorded(before) == named(before) == {"cpu"}
    assert device_of(after) == meta and recorded(after) == named(after) == {"meta"}
    held = [*after.state_dict.values(), *after.constants.values()]
    assert {each.device for each in held if isinstance(each, Tensor)} == {meta}
    assert {each.device for each in after.example_inputs[0]} == {meta}  # type: ignore[index]
    assert after.state_dict["head.weight"] is not None
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]


def test_what_is_tied_stays_tied_and_what_is_said_stays_said(meta: torch.device) -> None:
    before = program()
    said = record.Record("1")
    record.write(before.graph, said)
    after = on_device(before, meta)
    assert record.read(after) == said
    assert isinstance(after.state_dict["table.weight"], nn.Parameter)
    lazy = handles(before)
    there = on_device(lazy, meta)
    keys = {storage_key(there.state_dict[name]) for name in ("table.weight", "head.weight")}
    assert len(keys) == 1


def handles(ep: ExportedProgram) -> ExportedProgram:
    held = {storage_key(t): Handle(Held(t.detach(), t.dtype)) for t in ep.state_dict.values()}
    return with_other_values(ep, {name: held[storage_key(t)] for name, t in ep.state_dict.items()})


def test_what_is_read_when_it_is_used_is_moved_when_it_is_read(meta: torch.device) -> None:
    before = handles(program())
    after = on_device(before, meta)
    handle = after.state_dict["table.weight"]
    assert isinstance(handle, Handle) and handle.device == meta
    assert handle.read(slice(1, 3)).device == meta and handle.read(slice(1, 3)).shape == (2, 6)
    assert handle.read(torch.tensor([0, 2])).device == meta
    assert handle.lifted().dtype == torch.float64 and handle.lifted().device == meta
    back = moved(handle.source, torch.device("cpu"))
    assert isinstance(back, Held), "nothing is moved to and fro"
    assert torch.equal(back.read(slice(None)), before.state_dict["table.weight"].read())  # type: ignore[attr-defined]


def test_a_program_that_lives_there_is_returned_as_it_is() -> None:
    ep = program()
    assert on_device(ep, "cpu") is ep and on_device(ep, torch.device("cpu")) is ep


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:-1", "cuda:01", "CPU", "cpu:0", "meta", "cuda:0 "])
def test_what_is_no_device_says_what_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of cpu, cuda, cuda:N: choose one"):
        named_device(name)


def test_where_no_device_is_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3", torch.device("cuda", 1)):
        with pytest.raises(ConfigError, match=r"finds no CUDA device here: choose cpu, or install a build of torch"):
            named_device(name)


def test_which_devices_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    assert named_device("cuda") == torch.device("cuda", 1)
    assert named_device("cuda:0") == torch.device("cuda", 0)
    for name in ("cuda:7", "cuda:99999999999"):
        with pytest.raises(ConfigError, match=f"device {name}: torch finds cuda:0 to cuda:1 here: choose cpu or one"):
            named_device(name)
