"""``spinpass schemes``: the parts that a scheme is spelled with, the names that stand for one, and the recipes."""

from __future__ import annotations

import typer
from rich.table import Table

from spinpass.folders import BITS, measured, recipe_of
from spinpass.quantization import ALIASES, PARTS

from .options import AsJson
from .screen import screen_of


def schemes_command(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List what --quantize takes, part by part, names that stand for whole schemes, and what --bits stands for.

    Example: spinpass schemes
    """
    screen = screen_of(ctx, as_json, 0)
    recipes = {bits: recipe_of("auto", bits, "onnx").scheme or "values as they are loaded" for bits in BITS}
    known = measured()
    if as_json:
        parts = [{"example": part.example, "meaning": part.meaning, "runs_as": part.runs_as} for part in PARTS]
        screen.document({"parts": parts, "names": dict(ALIASES), "bits": recipes, "measured": known})
        return
    table = Table("part", "meaning", "in ONNX Runtime", title="Parts, joined by -", title_justify="left")
    for part in PARTS:
        table.add_row(part.example, part.meaning, part.runs_as)
    names = Table("name", "stands for", title="Names, which further parts may follow", title_justify="left")
    for name, scheme in ALIASES.items():
        names.add_row(name, scheme)
    by_bits = Table("--bits", "scheme", "MB", "perplexity ÷ float", title_justify="left", caption_justify="left")
    by_bits.title = "Recipes of spinpass export, for ONNX Runtime"
    by_bits.caption = f"MB and perplexity as measured: {known['about']}" if known else None
    for bits, scheme in recipes.items():
        found = known["rows"].get(f"{bits}", {}) if known else {}
        cells = (f"{found['mb']:.1f}", f"{found['mean']:.3f}, worst text {found['worst']:.3f}") if found else ("", "")
        by_bits.add_row(str(bits), scheme, *cells)
    screen.show(table, names, by_bits)
