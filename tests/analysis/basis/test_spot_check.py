"""Rules checked on the spot: what a rule says wrongly becomes a refusal with the node's name, at any size of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import spinpass
from spinpass.analysis import SpotCheck
from spinpass.analysis.basis import growth, spot_check
from spinpass.analysis.ops.rules import Movement, Multilinear, Normalization, Operand, Rule
from spinpass.analysis.ops.table import rule_of
from spinpass.graph import ProgramEditor, op_name, shape
from spinpass.planning.planner import Planner
from tests.support import models

HIDDEN = 24


class Stream(nn.Module):
    """Two blocks of a residual stream; ``between`` stands in front of the first block's linear layer."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, HIDDEN)
        self.norms = nn.ModuleList(norm(HIDDEN) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 40) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(40, HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 50)
        self.between = between or (lambda x: x)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for index, (norm, up, down) in enumerate(zip(self.norms, self.up, self.down)):
            h = norm(x)
            h = self.between(h) if index == 0 else h
            x = x + down(torch.relu(up(h)))
        return self.head(self.norms[2](x))


def program(between: Callable[[Tensor], Tensor] | None = None, norm: type[nn.Module] = nn.RMSNorm) -> ExportedProgram:
    return torch.export.export(Stream(between, norm).eval(), (torch.arange(6).view(2, 3),))


def moved(node: Node, forward: Callable[..., object] = lambda layout: layout) -> Movement:
    return Movement(node.all_input_nodes[0], forward, forward)  # type: ignore[arg-type]


def passing(node: Node) -> Multilinear:
    labels = tuple(range(len(shape(node))))
    return Multilinear(((Operand(node.all_input_nodes[0], labels),),), labels)


# operator -> what it is used for, and what a wrong rule says of it
FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Node], Rule]]] = {
    "aten::tanh": (torch.tanh, moved),
    "aten::roll": (lambda x: x.roll(1, -1), moved),
    "aten::flip": (lambda x: x.flip(-1), moved),
    "aten::cumsum": (lambda x: x.cumsum(-1), passing),
    "aten::softmax": (lambda x: x.softmax(-1), passing),
    "aten::index_select": (lambda x: x.index_select(-1, torch.arange(HIDDEN - 1, -1, -1)), moved),
    "aten::clamp": (lambda x: x.clamp(max=1.0), passing),
    "aten::abs": (torch.abs, moved),
    "aten::exp": (torch.exp, moved),
}


@pytest.fixture
def lie(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Node], Rule]], None]:
    """Let the table say something else of an operator."""

    def install(name: str, wrong: Callable[[Node], Rule]) -> None:
        told = lambda node: wrong(node) if op_name(node) == name else rule_of(node)
        monkeypatch.setattr(growth, "rule_of", told)
        monkeypatch.setattr(spot_check, "rule_of", told)

    return install


def refusals(ep: ExportedProgram) -> list[str]:
    return [str(r) for r in spinpass.plan(ep, spinpass.RotationConfig(form="offline")).refusals]


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_rule_becomes_a_refusal(name: str, lie: Callable[..., None]) -> None:
    between, wrong = FAULTS[name]
    ep = program(between)
    lie(name, wrong)
    found = [r for r in refusals(ep) if r.startswith("R1") and f"{name} does not commute" in r]
    assert found and name.split("::")[1] in found[0]
    spinpass.transform(ep, spinpass.RotationConfig(form="offline"))  # certified: the faulty space is left alone


@pytest.mark.parametrize("name", FAULTS)
def test_the_lie_would_change_the_program(
    name: str, lie: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check the same rules lead to another function, or to nothing: the tests above are not vacuous."""
    between, wrong = FAULTS[name]
    ep = program(between)
    lie(name, wrong)
    monkeypatch.setattr(SpotCheck, "__call__", lambda self, space: spot_check.Checked(None, ()))
    config = spinpass.RotationConfig(form="offline", rotations=("R1",))
    with pytest.raises(spinpass.errors.SpinpassError):
        spinpass.transform(ep, config)


def test_a_norm_that_is_told_to_centre(lie: Callable[..., None]) -> None:
    def wrong(node: Node) -> Rule:
        rule = rule_of(node)
        assert isinstance(rule, Normalization)
        return Normalization(rule.source, rule.weight, rule.bias, rule.eps, not rule.centres)

    for norm, name in ((nn.RMSNorm, "aten::rms_norm"), (nn.LayerNorm, "aten::layer_norm")):
        ep = program(norm=norm)
        lie(name, wrong)
        assert any("does not commute" in r for r in refusals(ep))


def test_another_eps_is_seen(lie: Callable[..., None]) -> None:
    ep = program(norm=nn.LayerNorm)
    lie("aten::layer_norm", lambda node: Normalization(*_parts(node), 0.5, True))
    assert any("aten::layer_norm does not commute" in r for r in refusals(ep))


def _parts(node: Node) -> tuple[Node, Node | None, Node | None]:
    rule = rule_of(node)
    assert isinstance(rule, Normalization)
    return rule.source, rule.weight, rule.bias


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("form", ["offline", "online"])
def test_right_rules_are_found_right_and_every_operator_is_run(name: str, form: str) -> None:
    plan = spinpass.plan(models.export_plain(models.build(name)), spinpass.RotationConfig(form=form))
    assert len(plan.spaces) >= 4 and not any("does not commute with a rotation here" in str(r) for r in plan.refusals)
    assert not any("not checked" in note for space in plan.spaces for note in space.notes)


def test_layers_share_their_checks() -> None:
    """As many checks for six layers as for three."""
    counts = []
    for layers in (3, 6):
        ep = models.export_plain(models.build("llama", num_hidden_layers=layers))
        editor = ProgramEditor(ep)
        planner = Planner(editor, spinpass.RotationConfig(form="online"))
        assert list(planner.edits())
        counts.append(len(planner._spot_check._found))
    assert counts[0] == counts[1] > 5


def test_a_large_table_is_cut() -> None:
    """A head of 60,000 rows would take 1 GB in float64."""
    with torch.device("meta"):
        model = _Head()
    ep = torch.export.export(model.to_empty(device="cpu").eval(), (torch.arange(6).view(2, 3),))
    plan = spinpass.plan(ep, spinpass.RotationConfig(form="offline", rotations=("R1",)))
    assert any(space.role == "R1" for space in plan.spaces)
    assert not any("not checked" in note for space in plan.spaces for note in space.notes)


class _Head(nn.Module):
    """A stream of 2048 channels between a table and a head of 60,000 rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60_000, 2048)
        self.norm, self.last = nn.RMSNorm(2048), nn.RMSNorm(2048)
        self.up, self.down = nn.Linear(2048, 64), nn.Linear(64, 2048)
        self.head = nn.Linear(2048, 60_000, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


class Positions(torch.nn.Module):
    """A table of positions is read at as many as there are tokens: a constant whose size only a run tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(32)[None])
        self.tokens, self.places = torch.nn.Embedding(20, 16), torch.nn.Embedding(32, 16)
        self.norm, self.up = torch.nn.RMSNorm(16), torch.nn.Linear(16, 24)
        self.down, self.head = torch.nn.Linear(24, 16), torch.nn.Linear(16, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(self.positions[:, : ids.shape[1]])
        return self.head(self.norm(x + self.down(torch.relu(self.up(self.norm(x))))))


class Groups(Positions):
    """Rows are dealt to groups whose sizes are data: no number was known for them when the program was exported."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids.flatten())
        sizes = torch.stack([(ids < 9).sum(), (ids >= 9).sum()]).tolist()
        for size in sizes:
            torch._check(size >= 0)
        h = self.norm(x + self.down(torch.relu(self.up(self.norm(x)))))
        return torch.cat([self.head(rows) for rows in h.split(sizes)])


@pytest.mark.parametrize("kind", [Positions, Groups])
def test_sizes_that_only_a_run_tells(kind: type[torch.nn.Module]) -> None:
    dynamic = ({1: torch.export.Dim("length", min=2, max=32)},) if kind is Positions else None
    source = torch.export.export(kind().double().eval(), (torch.randint(0, 20, (2, 6)),), dynamic_shapes=dynamic)
    rotated = spinpass.rotate(source, spinpass.RotationConfig(form="offline"))
    assert rotated.certificate is not None and rotated.certificate.ok
    assert any(s.name == "R1:residual" for s in rotated.plan.spaces), str(rotated.plan)
