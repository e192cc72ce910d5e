"""``spinpass inspect``: what an exported model says of itself, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import MANIFEST, Artefact, read_artefact
from spinpass.planning import layer_pattern

from .options import AsJson, Verbose
from .screen import screen_of
from .tables import trial_lines


def inspect_command(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Exported folder, .onnx file or .pt2 file.")],
    beside: Annotated[Path | None, typer.Option("--with", help="Another one, to share a KV cache with.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Also read every file and compare its hash.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Show what an exported model says of itself: rotations, the basis of its cache, certificates, files, versions.

    Nothing is written, but an export that was killed while it moved its files into
    DIR is finished; nothing outside DIR is opened. The exit code is 1 if its parts
    do not belong together, or the two cannot share a cache.

    Example: spinpass inspect out --check
    """
    screen = screen_of(ctx, as_json, verbose)
    found = _checked(path, files=check)
    if beside is not None:
        other = _checked(beside, files=check)
        found.require_same_basis(other)
    if as_json:
        screen.document({"ok": True} | found.to_dict())
    screen.show(*artefact_tables(found))
    if check:
        screen.show(f"{len(found.manifest['files'])} files are those that {MANIFEST} lists")
    if beside is not None:
        screen.show(f"shares a KV cache with {beside}", same_source(found, other))


def same_source(one: Artefact, two: Artefact) -> str:
    """Say whether two exports were made of the same files, by the hashes that each has of them."""
    mine, theirs = (each.manifest.get("source", {}).get("files", {}) for each in (one, two))
    if not mine or not theirs:
        return "what they were made of is not recorded"
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    return f"made of other files: {', '.join(differing)}" if differing else "made of the same files"


def _checked(path: Path, *, files: bool) -> Artefact:
    """Read and check. Raises ConfigError where there are no hashes of ``files`` to compare with."""
    found = read_artefact(path)
    if files and not found.manifest:
        raise ConfigError(f"{path} stands alone, with no spinpass.json to compare hashes with: leave out --check")
    found.check(files=files)
    return found


def artefact_tables(artefact: Artefact) -> list[Table]:
    """Tables of what it is, how it was rotated, and the basis of its cache. Equal lines of different layers are one."""
    about = _titled(str(artefact.path), "", "")
    try:
        for name, text in _facts(artefact.manifest):
            about.add_row(name, text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # others may have written the manifest
        why = f"{artefact.path.parent / MANIFEST} is not what spinpass writes: export the folder again"
        raise ExportError(why) from error
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
    made = manifest.get("record")
    if made:
        certificate = made.get("certificate")
        yield "rotation certified", str(certificate["verdict"]) if certificate else "no, as --no-verify asked"
    else:
        yield "rotation", "none: the original"
    exported = manifest.get("onnx") or manifest.get("openvino") or manifest.get("executorch") or {}
    if exported:
        proof = exported.get("certificate")
        yield "file certified", str(proof["verdict"]) if proof else f"no: {exported.get('uncertified')}"
    yield from (("tried", line) for line in trial_lines(manifest.get("trials", [])))
    if "hadamards" in exported:
        yield "online Hadamards", str(exported["hadamards"])
    made = manifest.get("quantization")
    if made:
        layers = Counter(f"{w['bits']} bits" + (f", groups of {w['group_size']}" if w["group_size"] else "")
                         for w in made["weights"].values())  # fmt: skip
        yield "weights", "; ".join(f"{count} of {what}" for what, count in layers.most_common()) or "float"
        yield "rounded", f"{len(made['activations'])} inputs of layers, {len(made['caches'])} keys and values"
    cache = manifest.get("cache")
    if cache:
        yield "cache", f"keys and values are integers of {cache['bits']} bits"
    for name, file in manifest.get("source", {}).get("files", {}).items():
        yield f"made of {name}", f"{file['bytes']:,} bytes, sha256 {file['sha256'][:16]}…"
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
