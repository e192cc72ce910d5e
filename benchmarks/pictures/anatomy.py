"""A decoder block from top to bottom, drawn from a real plan: the types of its axes, or where its rotations go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spinpass import RotationConfig

from .canvas import MARGIN, SMALL, WIDTH, Canvas
from .decoder import HEAD, HIDDEN, MLP, VOCABULARY, Block, read_block

THIRDS, HALVES = (76.0, 200.0, 324.0), (118.0, 282.0)  # where q, k and v stand, and gate and up
MIDDLE, RIGHT = WIDTH / 2, WIDTH - 13.0  # the residual stream runs along the right edge
CELL, STEP = 20.0, 14.0  # height of a cell, length of an arrow
SPACES = {"R1": "residual stream", "R2": "value heads", "R3": "query, key heads", "R4": "input of down_proj"}


def draw_axes() -> str:
    """Draw which space each axis of each tensor is in."""
    sheet = Canvas(
        "The axis types of one decoder block",
        "Each tensor of a decoder block with its axes. Axes of one colour share one basis: the residual stream R1, the "
        "value heads R2, the query and key heads R3, the input of the down projection R4.",
    )
    below = (
        "Each cell is an axis of a tensor. Axes of one colour share one",
        "basis and turn together. Grey axes are in no space.",
    )
    y = _legend(sheet, sheet.heading("Which basis each axis is in", *below))
    sizes = f"A tiny model: b batch, t tokens, {VOCABULARY} words. Others are sizes."
    return _Block(sheet, read_block(RotationConfig(form="offline")), formulas=False).drawn(
        sheet.lines(MARGIN, y, (sizes,))
    )


def draw_rotations() -> str:
    """Draw R1 to R4 with the residual stream rotated offline."""
    below = (
        "The cells of a weight are what it becomes: W g R1 is W with",
        "the norm's scale g and R1 folded in. A round box is computed",
        "while the model runs.",
    )
    return draw_block(RotationConfig(form="offline"), "R1 to R4, with R1 offline", below)


def draw_online_rotations() -> str:
    """Draw R1 to R4 with the inputs of linear layers rotated online."""
    below = (
        "The residual stream stays as it is. One Hadamard behind each",
        "norm serves all layers that read the norm.",
    )
    return draw_block(RotationConfig(form="online"), "R1 to R4, with R1 online", below)


def draw_block(config: RotationConfig, title: str, below: Sequence[str]) -> str:
    """Draw a block as the configuration has it rotated, under a title and lines of text."""
    block = read_block(config)
    folded = "; ".join(f"{role} is {space.form}" for role, space in sorted(block.spaces.items()))
    sheet = Canvas(
        title,
        "A decoder block. Under the name of each weight stands what is folded into it. A round box is a Hadamard, "
        f"which the program computes as it runs. {folded}.",
    )
    return _Block(sheet, block, formulas=True).drawn(_legend(sheet, sheet.heading(title, *below)))


def _legend(sheet: Canvas, y: float) -> float:
    widths = {"R1": HIDDEN, "R2": HEAD, "R3": HEAD, "R4": MLP}
    for number, (role, what) in enumerate(SPACES.items()):
        left, top = MARGIN + 180 * (number % 2), y + 26 * (number // 2)
        _cells(sheet, left + 15, top, [(role, role)])
        sheet.text(left + 36, top + CELL / 2, f"{what} ({widths[role]})", size=SMALL, anchor="start")
    return y + 64


def _cells(sheet: Canvas, x: float, y: float, cells: Sequence[tuple[str, str]]) -> float:
    """Draw cells side by side around x, each a text and the role that gives its colour. Return the y below them."""
    widths = [max(20.0, 8.5 * len(text) + 10) for text, _ in cells]
    left = x - sum(widths) / 2
    for (text, role), width in zip(cells, widths):
        kind = role.lower() or "none"
        sheet.area(left + 1, y, width - 2, CELL, kind, edge=kind)
        sheet.text(left + width / 2, y + CELL / 2, text, kind, size=SMALL, bold=bool(role))
        left += width
    return y + CELL


@dataclass(frozen=True)
class _Block:
    """The block's parts. Each is drawn around x from y downwards, and returns the y where it ends.

    Attributes:
        sheet: what is drawn on.
        block: what is drawn.
        formulas: whether weights show what they become, and Hadamards are what matters; else all show their axes.
    """

    sheet: Canvas
    block: Block
    formulas: bool

    def drawn(self, y: float) -> str:
        """Draw the decoder, and return the file."""
        y = self.values(MIDDLE, self.weight(MIDDLE, y, "embed_tokens"), "stream")
        self.sheet.line([(MIDDLE, y), (MIDDLE, y + 10)])
        top, y = y + 10, self.mlp(self.attention(y + 10))
        self.sheet.line([(MIDDLE, y), (MIDDLE, y + 10)])
        self.sheet.frame(5, top - 2, WIDTH - 10, y - top + 9)
        self.sheet.text(MARGIN, top + 14, "one block", "faint", size=SMALL, anchor="start")
        y += 10
        y = self.norm(y, "lm_head")
        y = self.values(MIDDLE, self.weight(MIDDLE, y, "lm_head"), "lm_head result")
        self.sheet.text(MIDDLE, y + 12, "logits", "faint", size=SMALL)
        return self.sheet.svg(y + 30)

    def attention(self, y: float) -> float:
        """Draw the first half of a block."""
        branch, y = y, self.norm(y, "q_proj")
        y = self.fan(y, THIRDS)
        ends = []
        for x, name, operand in zip(THIRDS, ("q_proj", "k_proj", "v_proj"), ("query", "key", "")):
            end = self.values(x, self.weight(x, y, name, fanned=True), f"{name} result")
            if operand:
                end = self.online(x, self.operator(x, end, "RoPE", 70), operand)
                end = self.values(x, end, operand)
            ends.append(end)
        y = max(ends)
        for x, end in zip(THIRDS, ends):
            self.sheet.line([(x, end), (x, y + STEP)], arrow=True)
        y = self.operator(MIDDLE, y, "softmax(q kᵀ) v", 340, arrow=False)
        y = self.values(MIDDLE, y, "attention result")
        y = self.values(MIDDLE, self.weight(MIDDLE, y, "o_proj"), "o_proj result")
        return self.sum(y, branch, "middle")

    def mlp(self, y: float) -> float:
        """Draw the second half of a block."""
        branch, y = y, self.norm(y, "gate_proj")
        y = self.fan(y, HALVES)
        ends = [
            self.values(x, self.weight(x, y, name, fanned=True), f"{name} result")
            for x, name in zip(HALVES, ("gate_proj", "up_proj"))
        ]
        for x in HALVES:
            self.sheet.line([(x, ends[0]), (x, ends[0] + STEP)], arrow=True)
        y = self.operator(MIDDLE, ends[0], "silu(gate) · up, channel by channel", 270, arrow=False)
        y = self.values(MIDDLE, self.online(MIDDLE, y, "down_proj input"), "down_proj input")
        y = self.values(MIDDLE, self.weight(MIDDLE, y, "down_proj"), "down_proj result")
        return self.sum(y, branch, "final")

    def arrow(self, x: float, y: float) -> float:
        self.sheet.line([(x, y), (x, y + STEP)], arrow=True)
        return y + STEP

    def weight(self, x: float, y: float, name: str, *, fanned: bool = False) -> float:
        """Draw a constant: its axes, or the product that it becomes."""
        y = y if fanned or name == "embed_tokens" else self.arrow(x, y)
        axes = [(axis.label, axis.role) for axis in self.block.tensors[name]]
        if self.formulas:
            (_, write), (_, read) = axes
            if name == "embed_tokens":
                axes = [("E", ""), *([(read, read)] if read else [])]
            else:
                axes = [(f"{write}ᵀ", write)] if write else []
                axes += [
                    ("W", ""),
                    *([("g", "")] if name in self.block.scaled else []),
                    *([(read, read)] if read else []),
                ]
        self.sheet.area(x - 54, y, 108, 46, "panel", edge="faint")
        self.sheet.text(x, y + 12, name, size=SMALL)
        _cells(self.sheet, x, y + 22, axes)
        return y + 46

    def values(self, x: float, y: float, name: str) -> float:
        """Draw the axes of a value, where the picture is about axes."""
        if self.formulas:
            return y
        return _cells(self.sheet, x, self.arrow(x, y), [(axis.label, axis.role) for axis in self.block.tensors[name]])

    def operator(self, x: float, y: float, text: str, width: float, *, arrow: bool = True) -> float:
        """Draw an operator without weights that are rotated."""
        y = self.arrow(x, y) if arrow else y + STEP
        self.sheet.area(x - width / 2, y, width, 26, "ground", edge="faint", round_=3)
        self.sheet.text(x, y + 13, text, size=SMALL)
        return y + 26

    def online(self, x: float, y: float, name: str) -> float:
        """Draw the Hadamard that stands in front of the value, if one does."""
        role = self.block.online.get(name, "")
        if not role:
            return y
        y = self.arrow(x, y)
        self.sheet.area(x - 54, y, 108, 26, role.lower(), edge=role.lower(), round_=13)
        self.sheet.text(x, y + 13, f"Hadamard {role}", role.lower(), size=SMALL, bold=True)
        return y + 26

    def norm(self, y: float, reader: str) -> float:
        """Draw a norm, and the Hadamard behind it where the layers that read it are rotated online."""
        scale = "without its scale g" if reader in self.block.scaled else "with its scale g"
        y = self.operator(MIDDLE, y, f"RMSNorm, {scale}", 200)
        return self.values(MIDDLE, self.online(MIDDLE, y, f"{reader} input"), f"{reader} input")

    def fan(self, y: float, to: Sequence[float]) -> float:
        """Lead one value to several places."""
        self.sheet.line([(MIDDLE, y), (MIDDLE, y + 8)])
        self.sheet.line([(to[0], y + 8), (to[-1], y + 8)])
        for x in to:
            self.sheet.line([(x, y + 8), (x, y + 8 + STEP)], arrow=True)
        return y + 8 + STEP

    def sum(self, y: float, branch: float, name: str) -> float:
        """Add what was computed to the stream, which left at the height ``branch``."""
        y = self.arrow(MIDDLE, y)
        self.sheet.line([(MIDDLE, branch + 5), (RIGHT, branch + 5), (RIGHT, y + 11), (MIDDLE + 12, y + 11)], arrow=True)
        self.sheet.area(MIDDLE - 11, y, 22, 22, "ground", edge="ink", round_=11)
        self.sheet.text(MIDDLE, y + 11, "+", size=16)
        return self.values(MIDDLE, y + 22, name)
