"""What a model's source says of who may use it and where it comes from: a licence, its text, a name on the hub.

| source | read |
|---|---|
| a folder, a model on the hub | the front matter of ``README.md``; ``LICENSE``, ``NOTICE`` and the like |
| a GGUF file | ``general.license`` and ``general.base_model``; its folder as above, where no other is there |
| a ``.pt2`` program | nothing |

Others have written all of this: what is no plain word or address is left out, and so is a file that leads elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinpass.formats import README, check_gguf, is_for_people

from .architecture import find_file
from .sources import Source

_ASKED = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")  # of the hub, which lists no files
_LARGEST = 1 << 20  # bytes
_WORD = re.compile(r"[\w.+-]{1,96}")
_LINK = re.compile(r"https?://[\w./~%#?=&+-]{1,300}|LICEN[SC]E[\w.-]{0,32}")
_HUB = re.compile(r"https?://huggingface\.co/([\w-][\w.-]*/[\w.-]+)/?")


@dataclass(frozen=True)
class Papers:
    """What a source says of itself; empty where it says nothing.

    Args:
        license, license_name, license_link: as the hub writes them in the front matter of a model card.
        base_model: the name on the hub, never a path.
        texts: files by name that go with every copy.
    """

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    base_model: str = ""
    texts: Mapping[str, bytes] = field(default_factory=dict)


def papers_of(source: Source, transformers: Any) -> Papers:
    """Read what there is; a file that cannot be read says nothing."""
    if source.kind == "program":
        return Papers()
    here = Path(source.location)
    told: dict[str, str] = {}
    files: dict[str, Path] = {}
    if source.kind == "transformers" and not here.is_dir():
        found = {name: find_file(transformers, source.location, name) for name in (README, *_ASKED)}
        files = {name: path for name, path in found.items() if path is not None}
        told["base_model"] = source.location
    elif source.gguf is None or len(list(here.glob("*.gguf"))) == 1:
        files = {path.name: path for path in sorted(here.iterdir()) if _is_own(path)}
    told = _front_matter(files.pop(README, None)) | told
    if source.gguf is not None:
        told |= _of_gguf(here / source.gguf)
    texts = {name: data for name, path in files.items() if (data := _read(path))}
    names = ("license", "license_name", "license_link", "base_model")
    return Papers(**{name: told.get(name, "") for name in names}, texts=texts)


def _is_own(path: Path) -> bool:
    """Say whether this is a text about the model, and a file of the folder or of the hub's cache."""
    real, home = path.resolve(), path.parent.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return is_for_people(path.name) and path.is_file() and (real.is_relative_to(home) or real.is_relative_to(cache))


def _read(path: Path | None) -> bytes:
    try:
        return b"" if path is None or path.stat().st_size > _LARGEST else path.read_bytes()
    except OSError:
        return b""


def _front_matter(card: Path | None) -> dict[str, str]:
    """The entries that matter of the YAML in front of a model card; of a list the first."""
    lines = _read(card).decode("utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    return dict(_entries(lines[1:end]))


def _entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line, after in zip(lines, [*lines[1:], ""]):
        name, colon, value = line.partition(":")
        allowed = {"license": _WORD, "license_name": _WORD, "license_link": _LINK}.get(name)
        if not colon or allowed is None:
            continue
        text = value.strip() or after.strip().removeprefix("-")
        if allowed.fullmatch(text.strip().strip("'\"")):
            yield name, text.strip().strip("'\"")


def _of_gguf(path: Path) -> dict[str, str]:
    from gguf.constants import GGML_QUANT_SIZES

    values = check_gguf(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}).values
    told = {
        "license": (values.get("general.license"), _WORD),
        "license_name": (values.get("general.license.name"), _WORD),
        "license_link": (values.get("general.license.link"), _LINK),
    }
    found = {name: str(value) for name, (value, allowed) in told.items() if allowed.fullmatch(str(value or ""))}
    based = _HUB.fullmatch(str(values.get("general.base_model.0.repo_url", "")))
    return found | ({"base_model": based[1]} if based else {})
