"""All hazards by name, and their exported programs."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path

from torch.export import ExportedProgram

from tests.mutations.hazard import Hazard
from tests.support.decoders import exported, made

THEMES = sorted(
    p.stem
    for p in Path(__file__).parent.glob("*.py")
    if p.stem not in ("hazard", "registry", "oracle") and not p.stem.startswith("test_")
)


def of_theme(theme: str) -> dict[str, type[Hazard]]:
    """The hazards that a file defines, in its order; classes that others derive from are no cases themselves."""
    module = import_module(f"tests.mutations.{theme}")
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Hazard) and c.__module__ == module.__name__
    ]
    bases = {b for c in own for b in c.__bases__}
    return {c.__name__: c for c in own if c not in bases}


ALL: dict[str, type[Hazard]] = {name: c for theme in THEMES for name, c in of_theme(theme).items()}


@lru_cache(16)
def program(name: str, decomposed: bool = False) -> ExportedProgram:
    """float64, every parameter random; ``decomposed`` to core ATen operators."""
    if decomposed:
        return program(name).run_decompositions()
    hazard = ALL[name]
    return exported(made(hazard()), hazard.inputs())


def functional(source: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators: what the pass does first with those that have some."""
    schemas = [n.target._schema for n in source.graph.nodes if hasattr(n.target, "_schema")]
    return source.run_decompositions({}) if any(s.is_mutable for s in schemas) else source
