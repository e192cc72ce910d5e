"""The pipeline from an exported program to a proved one, with the passes that it really runs, in their order."""

from __future__ import annotations

from spinpass.pipeline import PASSES

from .canvas import MARGIN, SMALL, WIDTH, Canvas

BEFORE = (
    ("torch.export", "A model becomes a program: a graph and its weights."),
    ("Functionalize", "A copy is opened. Writes in place become values."),
)
DECIDED = ("Find and decide", "Which axes share a basis? Rotate them, or say why not.")
MEANINGS = {
    "Materialize": "A computed weight becomes one stored weight.",
    "FuseNormScale": "A norm's scale g moves into what reads it: W → W g.",
    "Center": "What writes is centred: LayerNorm becomes RMSNorm.",
    "InsertRotations": "A Hadamard where nothing can be folded: x → x R.",
    "FoldRotations": "Weights take up the rotation: W → W R, or Rᵀ W.",
}
"""By the name of a pass, what it does, in a line of the picture."""
AFTER = (
    ("Compute constants", "Each weight once, in float64, and rounded once."),
    ("Certify", "Both programs run on the same inputs and must agree."),
)
BEHIND = (
    ("Quantize", "Weights, activations and caches are rounded to few bits."),
    ("Write and try", "ONNX, OpenVINO, ExecuTorch, a checkpoint; then it runs."),
)
_STEP, _BOX, _INSET = 16.0, 46.0, 10.0


def draw_pipeline() -> str:
    """Draw the steps of ``spinpass.pipeline`` below each other."""
    names = [each.name for each in PASSES]
    sheet = Canvas(
        "The steps of spinpass in order",
        f"From torch.export to a certified program. For each space: {', '.join(names)}.",
    )
    y = sheet.heading("From a model to a proved program", "Every step takes what the step above it has made.")
    for name, meaning in BEFORE:
        y = _box(sheet, y, name, meaning, arrow=0 if name == BEFORE[0][0] else _STEP)
    top = y + _STEP / 2
    y = _box(sheet, y, *DECIDED, kind="r1", arrow=36)
    for name in names:
        y = _box(sheet, y, name, MEANINGS[name], kind="r1")
    y += _INSET
    sheet.frame(MARGIN - 8, top, WIDTH - 2 * MARGIN + 16, y - top)
    sheet.text(MARGIN + 4, top + 15, "for each space", "r1", size=SMALL, anchor="start", bold=True)
    for name, meaning in AFTER:
        y = _box(sheet, y, name, meaning, kind="r2" if name == "Certify" else "panel")
    for name, meaning in BEHIND:
        y = _box(sheet, y, name, meaning)
    return sheet.svg(y + MARGIN)


def _box(sheet: Canvas, y: float, name: str, meaning: str, *, kind: str = "panel", arrow: float = _STEP) -> float:
    """Draw an arrow of that length down from y, and a step below it. Return the y where the step ends."""
    if arrow:
        sheet.line([(WIDTH / 2, y), (WIDTH / 2, y + arrow)], arrow=True)
    y += arrow
    edge = "faint" if kind == "panel" else kind
    sheet.area(MARGIN, y, WIDTH - 2 * MARGIN, _BOX, kind, edge=edge)
    sheet.text(MARGIN + _INSET, y + 14, name, anchor="start", bold=True)
    sheet.text(MARGIN + _INSET, y + 33, meaning, size=SMALL, anchor="start")
    return y + _BOX
