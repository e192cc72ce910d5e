"""The editor: copy in, new out; constants stay lazy, aliases stay shared, torch's verifier accepts the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from spinpass.certificate.programs import run
from spinpass.errors import InvariantError, ProgramError, QuantizedWeightError
from spinpass.graph import ProgramEditor, arguments, check_program, is_op, known_integers, op_name, shape
from spinpass.graph.constants import Constant
from spinpass.graph.folding import QueuedStep
from spinpass.graph.nodes import lifted
from tests.support.decoders import Decoder, exported, made, snapshot, tokens


class Model(nn.Module):
    """A parameter under two names, a buffer, a lifted constant, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
        self.register_buffer("passing", torch.tensor([2.0], dtype=torch.float64), persistent=False)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        picked = x[:, torch.tensor([3, 2, 1, 0])]
        return self.second(self.first(picked)) * self.scale * self.passing + self.frozen


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def program() -> ExportedProgram:
    torch.manual_seed(0)
    model = Model().double()
    nn.init.normal_(model.first.weight)
    nn.init.normal_(model.first.bias)
    return torch.export.export(model, (X,), strict=False)


def constant(editor: ProgramEditor, fqn: str) -> Node:
    return next(n for n in editor.nodes if editor.is_stored(n) and fqn in editor.fqns(n) and n.users)


def op(editor: ProgramEditor, name: str) -> Node:
    return next(n for n in editor.nodes if op_name(n) == f"aten::{name}")


def result(program: ExportedProgram) -> Tensor:
    out = run(program, (X,))[0]
    assert isinstance(out, Tensor)
    return out


def double(tensor: Tensor) -> Tensor:
    return tensor * 2


def test_an_untouched_program_comes_back_equal_and_new(program: ExportedProgram) -> None:
    before = snapshot(program)
    finished = ProgramEditor(program).finish()
    assert finished is not program and finished.graph_module is not program.graph_module
    assert torch.equal(result(finished), result(program))
    assert snapshot(program) == before
    assert str(finished.graph_signature) == str(program.graph_signature)
    assert (
        finished.state_dict.keys() == program.state_dict.keys()
        and finished.constants.keys() == program.constants.keys()
    )
    assert finished.state_dict is not program.state_dict


class Names(nn.Module):
    def forward(self, input: Tensor, input_1: Tensor, max: Tensor) -> Tensor:
        return input + input_1 + max


def test_names_that_python_has_a_meaning_for_are_kept() -> None:
    source = torch.export.export(Names(), tuple(torch.ones(2) for _ in range(3)))
    editor = ProgramEditor(source)
    assert [n.name for n in editor.nodes] == [n.name for n in source.graph.nodes]
    assert [n.name for n in editor.user_inputs()] == ["input", "input_1", "max"]
    assert editor.finish().graph_signature.user_inputs == source.graph_signature.user_inputs


def test_edits_never_reach_the_source(program: ExportedProgram) -> None:
    before = snapshot(program)
    editor = ProgramEditor(program)
    for fqn in ("first.bias", "scale", "passing", "frozen"):
        editor.queue(constant(editor, fqn), double)
    editor.call(torch.ops.aten.neg.default, op(editor, "mul"), after=op(editor, "mul"), origin="test")
    finished = editor.finish()
    assert snapshot(program) == before
    assert torch.equal(finished.state_dict["first.bias"], 2 * program.state_dict["first.bias"])
    assert torch.equal(finished.state_dict["scale"], 2 * program.state_dict["scale"])
    assert torch.equal(finished.constants["passing"], 2 * program.constants["passing"])  # type: ignore[operator]
    assert "passing" not in finished.state_dict


def test_parameters_stay_parameters(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    for fqn in ("first.bias", "frozen", "scale"):
        editor.queue(constant(editor, fqn), double)
    finished = editor.finish()
    assert (
        isinstance(finished.state_dict["first.bias"], nn.Parameter) and finished.state_dict["first.bias"].requires_grad
    )
    assert isinstance(finished.state_dict["frozen"], nn.Parameter) and not finished.state_dict["frozen"].requires_grad
    assert not isinstance(finished.state_dict["scale"], nn.Parameter)


def test_nothing_is_computed_before_the_end(program: ExportedProgram) -> None:
    seen: list[torch.dtype] = []

    def step(tensor: Tensor) -> Tensor:
        seen.append(tensor.dtype)
        return tensor

    editor = ProgramEditor(program)
    editor.queue(constant(editor, "first.bias"), step)
    assert not seen
    editor.finish()
    assert seen == [torch.float64]


def test_folds_round_once() -> None:
    """A thousand small steps in bfloat16 would lose everything."""
    value = Constant("w", torch.tensor([1.0], dtype=torch.bfloat16), [QueuedStep(lambda t: t * 1.0001)] * 1000)
    assert float(value.compute()) == float(torch.tensor(1.0001**1000).bfloat16())


def test_a_fold_may_not_change_the_shape() -> None:
    with pytest.raises(InvariantError, match=r"what Twice has queued changes a shape from \(2,\) to \(4,\)"):
        Constant("w", torch.ones(2), [QueuedStep(lambda t: torch.cat([t, t]), "Twice")]).compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_writes_in_place_leaves_the_stored_tensor_as_it_is(dtype: torch.dtype) -> None:
    stored = torch.ones(2, dtype=dtype)
    assert Constant("w", stored, [QueuedStep(lambda t: t.add_(1.0))]).compute().tolist() == [2.0, 2.0]
    assert stored.tolist() == [1.0, 1.0]


def test_an_alias_is_one_constant_and_stays_shared(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    weight = constant(editor, "first.weight")
    assert sorted(editor.fqns(weight)) == ["first.weight", "second.weight"]
    assert len(weight.users) == 2
    editor.queue(weight, double)
    finished = editor.finish()
    assert finished.state_dict["first.weight"] is finished.state_dict["second.weight"]
    assert torch.equal(finished.state_dict["first.weight"], 2 * program.state_dict["first.weight"])
    distinct = {
        t.data_ptr(): t.numel() * 8
        for t in [*program.state_dict.values(), *program.constants.values()]
        if isinstance(t, Tensor)
    }
    assert editor.nbytes() == sum(distinct.values())


def test_splitting_reuses_the_second_name(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    weight = constant(editor, "first.weight")
    second = list(weight.users)[1]
    copy = editor.split(weight, [second])
    assert editor.fqn(copy) != editor.fqn(weight)
    editor.queue(copy, double)
    finished = editor.finish()
    names = {"first.weight", "second.weight"}
    assert {editor.fqn(copy), editor.fqn(weight)} == names
    assert torch.equal(finished.state_dict[editor.fqn(weight)], program.state_dict["first.weight"])
    assert torch.equal(finished.state_dict[editor.fqn(copy)], 2 * program.state_dict["first.weight"])
    assert finished.state_dict.keys() == program.state_dict.keys()


def test_splitting_a_constant_without_a_second_name_adds_one(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    node = constant(editor, "first.bias")
    editor.queue(node, double)
    copy = editor.split(node, list(node.users))
    finished = editor.finish()
    assert editor.fqn(copy) == "first.bias_untied"
    assert torch.equal(finished.state_dict["first.bias_untied"], 2 * program.state_dict["first.bias"])


def test_new_constants_stand_among_the_parameters_in_signature_order(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    total = next(iter(editor.output_node.all_input_nodes))
    one = editor.add_constant("extra", torch.ones(4, dtype=torch.float64), steps=[double])
    two = editor.add_constant("extra", torch.ones(4, dtype=torch.float64))
    last = editor.call(torch.ops.aten.add.Tensor, total, one, after=total, origin="test")
    last = editor.call(torch.ops.aten.add.Tensor, last, two, after=last, origin="test")
    editor.replace(total, last, [editor.output_node])
    finished = editor.finish()
    kinds = [s.kind for s in finished.graph_signature.input_specs]
    assert kinds == sorted(
        kinds, key=[InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT].index
    )
    assert [s.arg.name for s in finished.graph_signature.input_specs] == [
        n.name for n in finished.graph.nodes if n.op == "placeholder"
    ]
    assert {"extra", "extra_1"} <= finished.state_dict.keys()
    torch.testing.assert_close(result(finished), result(program) + 3)


def test_a_program_without_parameters_takes_a_constant() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    source = torch.export.export(Bare(), (X,))
    editor = ProgramEditor(source)
    node = op(editor, "mul")
    added = editor.add_constant("extra", torch.ones(4, dtype=torch.float64))
    total = editor.call(torch.ops.aten.add.Tensor, node, added, after=node, origin="test")
    editor.replace(node, total, [editor.output_node])
    torch.testing.assert_close(result(editor.finish()), result(source) + 1)


def test_materialized_expressions_are_computed_in_float64() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 + self.weight.to(torch.bfloat16).float())

    source = torch.export.export(Scaled(), (torch.ones(3, 2),))
    editor = ProgramEditor(source)
    factor = next(n for n in editor.nodes if op_name(n) == "aten::add")
    assert editor.is_constant(factor) and not editor.is_stored(factor)
    expected = 1.0 + torch.tensor([0.1, 0.2]).double()  # the cast to bfloat16 is lifted
    torch.testing.assert_close(editor.deferred(factor)(), expected, rtol=0, atol=0)
    stored = editor.materialize(factor)
    editor.queue(stored, double)
    finished = editor.finish()
    assert torch.equal(finished.state_dict[editor.fqn(stored)], (2 * expected).float())
    assert "aten.add" not in finished.graph_module.code


def test_deferred_values_are_those_of_now(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    node = constant(editor, "first.bias")
    now = editor.deferred(node)
    editor.queue(node, double)
    assert torch.equal(now(), program.state_dict["first.bias"])
    assert torch.equal(editor.deferred(node)(), 2 * program.state_dict["first.bias"])
    with pytest.raises(InvariantError, match="is not a constant"):
        editor.deferred(op(editor, "linear"))


def test_replaced_nodes_are_followed(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    node = op(editor, "linear")
    a = editor.call(torch.ops.aten.neg.default, node, after=node, origin="test")
    b = editor.call(torch.ops.aten.neg.default, a, after=a, origin="test")
    editor.replace(a, b)
    assert editor.current(a) is b and editor.current(node) is node
    assert b.args == (a,)


def test_inserted_nodes_carry_their_value_and_origin(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    node = op(editor, "linear")
    made_ = editor.call(torch.ops.aten.transpose.int, node, 0, 1, after=node, origin="R9:here")
    assert shape(made_) == (4, 3)
    assert made_.meta["custom"]["spinpass_origin"] == "R9:here"
    assert "R9:here" in made_.meta["stack_trace"]
    assert made_.meta["nn_module_stack"] == node.meta["nn_module_stack"]


def test_cleanup_keeps_placeholders_and_assertions(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    node = op(editor, "linear")
    editor.call(torch.ops.aten.neg.default, node, after=node, origin="test")
    editor.cleanup()
    assert "neg" not in str(editor.graph)
    assert [n.name for n in editor.nodes if n.op == "placeholder"] == [
        n.name for n in program.graph.nodes if n.op == "placeholder"
    ]


def test_stale_placeholders_break_the_invariant(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    editor.inputs.reverse()
    with pytest.raises(InvariantError, match="order of the signature"):
        editor.finish()


def test_a_node_without_a_value_breaks_the_invariant(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    del op(editor, "linear").meta["val"]
    with pytest.raises(InvariantError, match="has no recorded value"):
        editor.finish()


def test_arguments_by_name(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    bound = arguments(op(editor, "linear"))
    assert set(bound) == {"input", "weight", "bias"} and isinstance(bound["weight"], Node)
    assert not is_op(editor.output_node) and op_name(editor.output_node) == "output"


def test_lifted_arguments() -> None:
    editor = ProgramEditor(exported(made(Decoder())))
    node = op(editor, "linear")
    node.kwargs = {"dtype": torch.bfloat16, "sizes": [1, torch.complex64], "other": torch.int8}
    _, kwargs = lifted(node)
    assert kwargs == {"dtype": torch.float64, "sizes": [1, torch.complex128], "other": torch.int8}


def test_small_integer_constants_are_known(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    index = op(editor, "index")
    found = [known_integers(i) for i in arguments(index)["indices"] if isinstance(i, Node)]
    assert len(found) == 1 and found[0] is not None and found[0].tolist() == [3, 2, 1, 0]


def test_user_inputs_and_outputs() -> None:
    editor = ProgramEditor(exported(made(Decoder())))
    assert [n.name for n in editor.user_inputs()] == ["ids"]
    assert [(i, editor.user_output_index(i)) for i, *_ in editor.output_values()] == [(0, 0)]


# -- what is not a program -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2)])
def test_not_a_program(thing: Any) -> None:
    with pytest.raises(ProgramError, match=f"got {type(thing).__name__}; export the model first"):
        check_program(thing)


def test_a_program_that_lost_a_constant(program: ExportedProgram) -> None:
    program.state_dict.pop("scale")
    with pytest.raises(ProgramError, match="names a constant 'scale' that it does not hold"):
        ProgramEditor(program)


def test_a_program_without_values(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    for node in editor.nodes:
        node.meta.pop("val", None)
    with pytest.raises(ProgramError, match="no tensor values recorded"):
        editor.fake_mode()


def test_packed_weights(program: ExportedProgram) -> None:
    program.state_dict["scale"] = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    with pytest.raises(QuantizedWeightError, match="scale is a quantized or packed weight"):
        check_program(program)


def test_tensor_subclasses(program: ExportedProgram) -> None:
    class Packed(Tensor):
        pass

    program.state_dict["scale"] = torch.ones(4).as_subclass(Packed)
    with pytest.raises(QuantizedWeightError, match=r"scale is a quantized or packed weight \(Packed"):
        check_program(program)


def test_tokens_of_the_editor_are_those_of_the_program() -> None:
    source = exported(made(Decoder()))
    assert torch.equal(run(ProgramEditor(source).finish(), (tokens(),))[0], run(source, (tokens(),))[0])
