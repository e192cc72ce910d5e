"""Constants that are read when they are used: the same values as tensors, in every operator and program."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ProgramError
from spinpass.execution import run
from spinpass.graph import Handle, Held, materialize, sources, spooled, storage_key, values_of, with_other_values
from spinpass.graph.folding import QueuedStep
from spinpass.quantization import quantize
from tests.support.decoders import Decoder, exported, made, tokens

SIZES = {"layers": 1}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks of rows are read of tiny tables, too."""
    from spinpass.graph import handles

    monkeypatch.setattr(handles, "LARGE", 256)
    monkeypatch.setattr(sources, "LARGE", 256)
    monkeypatch.setattr(sources, "_BLOCK", 128)


class Counted(Held):
    """Counts what is read."""

    reads: ClassVar[list[int]] = []

    def read(self, rows: slice | Tensor) -> Tensor:
        found = super().read(rows)
        Counted.reads.append(found.numel())
        return found


def handle(*shape: int, dtype: torch.dtype = torch.float32) -> Handle:
    Counted.reads = []
    return Handle(Counted(torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16(), dtype))


def streamed(program: ExportedProgram) -> ExportedProgram:
    """The program with every parameter and tied parameters of one handle."""
    held: dict[object, Handle] = {}
    for tensor in program.state_dict.values():
        held.setdefault(storage_key(tensor), Handle(Held(tensor.detach(), tensor.dtype)))
    return with_other_values(program, {name: held[storage_key(t)] for name, t in program.state_dict.items()})


# -- operators --------------------------------------------------------------------------------------------------------


def test_operators_take_it_for_the_tensor() -> None:
    table, x = handle(50, 16), torch.randn(3, 5, 16)
    whole = values_of(table)
    assert (table.shape, table.dtype, table.nbytes) == (whole.shape, torch.float32, whole.nbytes)
    assert torch.equal(table + 1, whole + 1) and torch.equal(table.to(torch.float64), whole.double())
    assert torch.allclose(nn.functional.linear(x, table), nn.functional.linear(x, whole), atol=1e-6)
    bias = torch.randn(50)
    assert torch.allclose(nn.functional.linear(x, table, bias), nn.functional.linear(x, whole, bias), atol=1e-6)
    assert torch.equal(torch.stack([table[2], table[3]]), whole[2:4]) and type(table.clone()) is Tensor
    assert type(table.detach()) is Handle and torch.equal(torch.from_numpy(table.numpy()), whole)


def test_a_lookup_reads_the_rows_that_it_finds() -> None:
    table, ids = handle(50, 16), torch.tensor([[7, 0, 7], [49, 3, 0]])
    found = nn.functional.embedding(ids, table)
    assert Counted.reads == [4 * 16] and torch.equal(found, nn.functional.embedding(ids, values_of(table)))
    assert torch.equal(torch.index_select(table, 0, ids[0]), values_of(table)[ids[0]])
    assert torch.equal(torch.index_select(table, 1, ids[0, :2]), values_of(table)[:, ids[0, :2]])
    for wrong in (50, -1):
        with pytest.raises(IndexError, match="out of range"):
            nn.functional.embedding(torch.tensor([wrong]), table)


def test_a_product_reads_a_block_of_rows_at_a_time() -> None:
    table = handle(50, 16)
    nn.functional.linear(torch.randn(2, 16), table)
    assert max(Counted.reads) == 32 and sum(Counted.reads) == 50 * 16


@pytest.mark.parametrize("linear", [nn.functional.linear, torch.ops.aten.linear.default], ids=["function", "operator"])
def test_rows_that_do_not_lie_side_by_side_are_multiplied_by_blocks_too(linear: Any) -> None:
    """torch would expand the matrix to one for each sequence, and read and copy it whole."""
    weight = handle(64, 8)
    x = torch.randn(2, 5, 8)[:, -1:]
    assert not x.is_contiguous()
    got = linear(x, weight, torch.arange(64.0))
    assert max(Counted.reads) < 64 * 8 and type(got) is Tensor
    torch.testing.assert_close(got, nn.functional.linear(x, weight.read(), torch.arange(64.0)))


def test_nothing_is_written_into_it() -> None:
    table = handle(4, 4)
    for write in (lambda: table.add_(1), lambda: torch.add(table, 1, out=table), lambda: table.copy_(torch.ones(4, 4))):
        with pytest.raises(ProgramError, match="writes into a constant.*spinpass.materialize"):
            write()


def test_copies_and_pickles() -> None:
    parameter = nn.Parameter(handle(4, 4), requires_grad=False)
    again = copy.deepcopy(parameter)
    assert isinstance(again, nn.Parameter) and storage_key(again) == storage_key(parameter)
    with pytest.raises(ProgramError, match="materialize"):
        torch.save({"x": parameter}, "/dev/null")


@pytest.mark.parametrize("axes", [frozenset({1}), frozenset({0}), None])
def test_folds_are_those_of_the_tensor(axes: frozenset[int] | None) -> None:
    table = handle(50, 16)
    step = QueuedStep(lambda t: t * (1 + 1e-9) + 1 / 3, "shift", axes)
    made_of = table.folded([step])
    exact = values_of(table).double() * (1 + 1e-9) + 1 / 3
    assert torch.equal(values_of(made_of), exact.float())
    assert torch.equal(made_of.read(torch.tensor([3, 1])), exact.float()[[3, 1]])
    assert torch.equal(values_of(made_of.lifted(unrounded=True)), exact)
    assert torch.equal(values_of(made_of.lifted()), exact.float().double())


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_program_of_handles_is_rotated_and_certified_as_the_one_of_tensors(tied: bool) -> None:
    program = exported(made(Decoder(tied=tied, **SIZES)))
    config = spinpass.RotationConfig(form="online")
    lazy, plain = spinpass.transform(streamed(program), config), spinpass.transform(program, config)
    folded = [name for name, tensor in lazy.state_dict.items() if isinstance(tensor, Handle)]
    assert folded and lazy.state_dict.keys() == plain.state_dict.keys()
    for name, tensor in plain.state_dict.items():
        assert torch.equal(values_of(lazy.state_dict[name]), tensor), name
    assert spinpass.verify(program, lazy).ok
    ids = (tokens(),)
    assert torch.allclose(run(lazy, ids)[0], run(plain, ids)[0], atol=1e-5)


def test_a_program_of_handles_is_quantized_as_the_one_of_tensors() -> None:
    program = exported(made(Decoder(**SIZES), dtype=torch.float32))
    inputs = [(tokens(),)]
    for scheme in ("w4g16-rtn-a8-head8-embed8", "w4g16-gptq-a8"):
        lazy, plain = quantize(streamed(program), scheme, inputs), quantize(program, scheme, inputs)
        assert any(isinstance(t, Handle) for t in lazy.program.state_dict.values())
        for name, weight in plain.report.weights.items():
            assert torch.equal(lazy.report.weights[name].codes.q, weight.codes.q), name
            assert abs(lazy.report.weights[name].error - weight.error) < 1e-6
            assert torch.equal(values_of(lazy.program.state_dict[name]), plain.program.state_dict[name]), name


def test_what_was_read_is_kept_in_a_file(tmp_path: Path) -> None:
    program = streamed(exported(made(Decoder(tied=True, **SIZES), dtype=torch.float32)))
    lazy = spinpass.transform(program, spinpass.RotationConfig(form="online"))
    kept = spooled(lazy, tmp_path, 1 << 30)
    ids = (tokens(),)
    assert torch.allclose(run(kept, ids)[0], run(lazy, ids)[0], atol=1e-6)
    assert torch.equal(run(kept, ids)[0], run(kept, ids)[0])
    assert not list(tmp_path.iterdir())  # the files have no names
    unkept = spooled(lazy, tmp_path, 0).state_dict
    assert all(storage_key(unkept[name]) == storage_key(tensor) for name, tensor in lazy.state_dict.items())
    for name, tensor in lazy.state_dict.items():
        assert torch.equal(values_of(kept.state_dict[name]), values_of(tensor))


def test_materialized_it_is_an_ordinary_program(tmp_path: Path) -> None:
    plain = exported(made(Decoder(tied=True, **SIZES)))
    program = materialize(streamed(plain))
    assert not any(isinstance(tensor, Handle) for tensor in program.state_dict.values())
    for each in (program, plain):
        assert len({t.data_ptr() for t in each.state_dict.values()}) < len(each.state_dict)  # the head is the table
    assert materialize(plain) is plain


@pytest.mark.parametrize("axes", [{0}, {0, 1}])
def test_what_mixes_its_rows_is_folded_once_however_it_is_read(axes: set[int]) -> None:
    """A block of its rows would take a fold of the whole."""
    table, folds = handle(64, 16), []

    def step(t: Tensor) -> Tensor:
        folds.append(t.shape)
        return t * 2

    folded = table.folded([QueuedStep(step, "double", frozenset(axes))])
    x = torch.randn(3, 16)
    for read in (lambda: list(folded.blocks()), lambda: nn.functional.linear(x, folded)):
        folds.clear()
        read()
        assert sum(shape.numel() for shape in folds) == 64 * 16
    assert not folded.in_parts and table.in_parts
    torch.testing.assert_close(nn.functional.linear(x, folded), x @ (2 * values_of(table)).t())
