"""The tables of ``spinpass inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from spinpass.formats import Artefact
from spinpass.planning import layer_pattern


def artefact_tables(artefact: Artefact) -> list[Table]:
    """What it is, how it was rotated, and the basis of its cache: equal lines of different layers together."""
    about = _titled(str(artefact.path), "", "")
    for name, text in _facts(artefact.manifest):
        about.add_row(name, text)
    if not artefact.rotations:
        about.add_row("rotations", "none that it knows of")
    tables = [about]
    if artefact.rotations:
        tables.append(_rotations(artefact))
    if artefact.bases:
        tables.append(_bases(artefact))
    return tables


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not manifest:
        yield "manifest", "none: the file stands alone"
        return
    yield "model", str(manifest.get("model", "unknown"))
    yield "versions", ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
    certificate = (manifest.get("record") or {}).get("certificate")
    yield "rotation certified", certificate["verdict"] if certificate else "no"
    exported = manifest.get("onnx") or manifest.get("executorch") or {}
    if exported:
        proof = exported.get("certificate")
        yield "file certified", proof["verdict"] if proof else f"no: {exported.get('uncertified')}"
    if "hadamards" in exported:
        yield "online Hadamards", str(exported["hadamards"])
    made = manifest.get("quantization")
    if made:
        layers = Counter(f"{w['bits']} bits" + (f", groups of {w['group_size']}" if w["group_size"] else "")
                         for w in made["weights"].values())  # fmt: skip
        yield "weights", "; ".join(f"{count} of {what}" for what, count in layers.most_common()) or "float"
        yield "rounded", f"{len(made['activations'])} inputs of layers, {len(made['caches'])} keys and values"
    for name, file in manifest.get("files", {}).items():
        yield name, f"{file['bytes']:,} bytes, sha256 {file['sha256'][:16]}…"


def _rotations(artefact: Artefact) -> Table:
    table = _titled("Rotations", "space", "SHA-256 of the matrix")
    grouped: dict[tuple[str, str], int] = {}
    for space, fingerprint in artefact.rotations.items():
        key = (layer_pattern(space), fingerprint[:16])
        grouped[key] = grouped.get(key, 0) + 1
    for (space, fingerprint), count in grouped.items():
        table.add_row(f"{space} ({count}×)" if count > 1 else space, f"{fingerprint}…")
    return table


def _bases(artefact: Artefact) -> Table:
    table = _titled("Cache", "input or output", "basis")
    lines = ((layer_pattern(name), f"{each.rotation}, axis {each.dim}") for name, each in artefact.bases.items())
    for (name, basis), count in Counter(lines).items():
        table.add_row(f"{name} ({count}×)" if count > 1 else name, basis)
    return table


def _titled(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
