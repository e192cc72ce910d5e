"""What :mod:`benchmarks.trained` learns from: the files that any environment of the project has installed.

    standard library, site-packages  ->  .py, .rst, .md, .txt, licences  ->  paragraphs, each once  ->  documents

Left out is what the yardstick scores on: any paragraph with ``SHARED`` words in a row of one of its texts, however
wrapped or commented, so that a vendored copy of a module falls with it; the help texts; and this project. The order is
that of a hash of the path, every ``HELD_OUT``-th document is kept for scoring, and no package gives more than
``SHARE`` characters: what one machine reads another reads too, but for what its releases changed.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.texts import scored_texts

SHARED = 8  # words in a row that two texts do not have in common by chance
HELD_OUT = 50
SHARE = 1_500_000
TOTAL = 12_000_000  # characters to learn from
_SIZES = range(500, 100_000)  # bytes of a file: neither a stub nor a table
_SUFFIXES = (".py", ".rst", ".md", ".txt")
_NAMES = ("license", "licence", "copying", "notice")
_NOT = {"__pycache__", "pydoc_data", "spinpass", "site-packages", "dist-packages", "test", "lib2to3", "idle_test"}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and others to be scored on."""

    learned: tuple[str, ...]
    held_out: tuple[str, ...]


def read(total: int = TOTAL) -> Corpus:
    """Documents of ``total`` characters, of which a share is held out."""
    scored, seen = set(runs("\n\n".join(scored_texts().values()))), set[str]()
    shares: Counter[str] = Counter()
    learned, held_out, length = list[str](), list[str](), 0
    for package, path in _files():
        if length >= total:
            break
        if shares[package] >= SHARE:
            continue
        text = _unseen(path, seen, scored)
        shares[package] += len(text)
        length += len(text)
        if text:
            (held_out if (len(learned) + len(held_out)) % HELD_OUT == 0 else learned).append(text)
    return Corpus(tuple(learned), tuple(held_out))


def _files() -> list[tuple[str, Path]]:
    """Package and path of every file to read, in the order of a hash of its path below the folder it was found in."""
    paths = sysconfig.get_paths()
    found = {}
    for root in map(Path, sorted({paths["stdlib"], paths["purelib"], paths["platlib"]})):
        for path in root.rglob("*"):
            below = path.relative_to(root)
            if below.parts[0].startswith(("spinpass", "__editable__")) or _NOT.intersection(below.parts):
                continue
            wanted = path.suffix in _SUFFIXES or path.name.lower().startswith(_NAMES)
            if wanted and path.is_file() and path.stat().st_size in _SIZES:
                name = below.as_posix()
                found[hashlib.sha256(name.encode()).hexdigest()] = (below.parts[0], path)
    return [found[key] for key in sorted(found)]


def _unseen(path: Path, seen: set[str], scored: set[int]) -> str:
    """The paragraphs of a file that no file before it has, and no scored text; adds them to those ``seen``."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph not in seen and scored.isdisjoint(runs(paragraph)):
            seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


def runs(text: str) -> Iterable[int]:
    """Hashes of every :data:`SHARED` words in a row; of all words of a shorter text, which it may share, none."""
    words = _WORD.findall(text)
    return (hash(tuple(words[k : k + SHARED])) for k in range(len(words) - SHARED + 1))
