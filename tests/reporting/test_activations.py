"""Sites, their values and their pairs: against hooks on the module, and with sites missing or mistaken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spinpass
from spinpass.evaluation.scoring import ProgramScorer
from spinpass.passes.functionalize import open_program
from spinpass.quantization.layers.sites import weight_sites
from spinpass.reporting.activations import INPUT, KEY, VALUE, Name, WatchedScorer, find_sites, paired_sites
from tests.support import programs, reports
from tests.support.decoders import Decoder, made


def scored(program: Any, like: WatchedScorer | None = None) -> WatchedScorer:
    scorer = WatchedScorer(program, like)
    for ids in reports.texts():
        scorer.logits(ids)
    return scorer


def hooked(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weight name -> every input (tokens, channels) that its linear layer gets on the texts."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=f"{name}.weight": seen.setdefault(n, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for ids in reports.texts():
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in inputs]) for name, inputs in seen.items()}


def test_inputs_are_what_hooks_on_the_module_see() -> None:
    model, program = reports.outlying()
    found = scored(program).statistics()
    expected = hooked(model)
    inputs = {name.weight: statistics for name, statistics in found.items() if name.kind == INPUT}
    assert inputs.keys() == expected.keys()
    for weight, statistics in inputs.items():
        assert statistics.vectors == len(expected[weight])
        assert torch.allclose(statistics.peaks, expected[weight].abs().amax(0), rtol=1e-5)


def test_logits_are_those_of_the_program() -> None:
    _, program = reports.outlying()
    scorer, ids = WatchedScorer(program), reports.texts()[0]
    assert torch.equal(scorer.logits(ids), ProgramScorer(program).logits(ids))


def test_after_is_the_rotated_input() -> None:
    model, program = reports.outlying()
    plan = spinpass.plan(program, spinpass.RotationConfig(rotations=("R4",)))
    rotated = spinpass.transform(program, plan=plan)
    before = scored(program)
    pairs, unpaired = paired_sites(before.statistics(), scored(rotated, before).statistics())
    assert not unpaired
    readers = {weight: space for space in plan.spaces for weight in space.readers}
    assert readers
    for pair in (p for p in pairs if p.kind == INPUT):
        x = hooked(model)[pair.weights[0]]
        if pair.weights[0] in readers:
            x = readers[pair.weights[0]].rotation.apply(x.double(), -1).float()
            assert not torch.allclose(pair.before.peaks, pair.after.peaks, rtol=0.1)
        assert torch.allclose(pair.after.peaks, x.abs().amax(0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["hadamard", "random-matrix"])
@pytest.mark.parametrize("form", ["online", "offline"])
def test_every_site_has_its_partner(kind: Any, form: Any) -> None:
    _, program = reports.outlying()
    before = scored(program)
    after = scored(spinpass.transform(program, spinpass.RotationConfig(kind=kind, form=form)), before)
    pairs, unpaired = paired_sites(before.statistics(), after.statistics())
    assert not unpaired, "matrices that the pass adds are no layers of the model"
    names = [name for pair in pairs for name in pair.names]
    assert sorted(map(str, names)) == sorted(map(str, before.statistics()))
    assert {name.kind for name in names} == {INPUT, KEY, VALUE}
    attention = next(p for p in pairs if len(p.weights) == 3)
    assert len({weight.rsplit(".", 2)[0] for weight in attention.weights}) == 1, "q, k and v read one value"


def test_rotation_lowers_what_the_report_shows() -> None:
    worst = [p for p in reports.report().pairs if p.kind == INPUT and p.before.ratio > 50]
    assert worst and all(p.after.ratio < p.before.ratio / 3 for p in worst)


def test_an_untied_head_keeps_its_name() -> None:
    program = programs.program("llama_tied", "hf", torch.float32)
    before = WatchedScorer(program)
    rotated = WatchedScorer(spinpass.transform(program, spinpass.RotationConfig(tied="untie")), like=before)
    for scorer in (before, rotated):
        scorer.logits(list(range(5, 15)))
    assert paired_sites(before.statistics(), rotated.statistics())[1] == ()


# -- what may go wrong ------------------------------------------------------------------------------------------------


def test_a_site_that_is_missing_after_rotation_is_reported() -> None:
    found = scored(reports.outlying()[1]).statistics()
    gone = next(name for name in found if name.kind == KEY)
    pairs, unpaired = paired_sites(found, {name: s for name, s in found.items() if name != gone})
    assert [(u.name, u.why) for u in unpaired] == [(gone, "the rotated program has no such site")]
    assert all(gone not in pair.names for pair in pairs) and len(pairs) > 4
    assert paired_sites({}, {gone: found[gone]})[1][0].why == "only the rotated program has this site"


def test_a_layer_that_another_program_lacks_is_reported() -> None:
    before = scored(reports.outlying()[1])
    after = scored(reports.export(made(Decoder(layers=1), dtype=torch.float32)), before)
    unpaired = paired_sites(before.statistics(), after.statistics())[1]
    assert unpaired and all("blocks.1" in u.name.weight for u in unpaired)


def test_values_of_different_width_are_no_pair() -> None:
    found = scored(reports.outlying()[1]).statistics()
    inputs = [name for name in found if name.kind == INPUT]
    wide = next(n for n in inputs if len(found[n].peaks) != len(found[inputs[0]].peaks))
    pairs, unpaired = paired_sites({inputs[0]: found[inputs[0]]}, {inputs[0]: found[wide]})
    sizes = len(found[inputs[0]].peaks), len(found[wide].peaks)
    assert not pairs and unpaired[0].why == f"{sizes[0]} channels before, {sizes[1]} after: not the same value"
    assert str(inputs[0]) in unpaired[0].to_dict()["site"]


def test_pairs_go_by_name_whatever_the_order() -> None:
    found = scored(reports.outlying()[1]).statistics()
    pairs, unpaired = paired_sites(found, dict(reversed(found.items())))
    assert not unpaired and all(pair.before is pair.after for pair in pairs)


def test_a_value_that_splits_after_rotation_becomes_two_pairs() -> None:
    found = scored(reports.outlying()[1]).statistics()
    shared = next(p for p in paired_sites(found, found)[0] if len(p.names) == 3)
    other = next(s for s in found.values() if len(s.peaks) == len(shared.before.peaks) and s is not shared.before)
    pairs, _ = paired_sites(found, found | {shared.names[0]: other})
    assert [p.names for p in pairs if shared.names[0] in p.names] == [shared.names[:1]]
    assert shared.names[1:] in [p.names for p in pairs]


def test_a_weight_that_is_used_twice_has_two_sites() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(self.table(ids)).relu()))

    editor = open_program(torch.export.export(Shared().eval(), (torch.ones(2, 5, dtype=torch.long),)))
    names = [name for named in find_sites(editor).values() for name in named]
    assert Name(INPUT, "layer.weight", 0) in names and Name(INPUT, "layer.weight", 1) in names
    assert str(Name(INPUT, "layer.weight", 1)) == "input of layer.weight, use 2"


def test_layers_that_cannot_be_measured_are_counted() -> None:
    program = reports.outlying()[1]
    assert WatchedScorer(program).left == weight_sites(open_program(program))[1]
