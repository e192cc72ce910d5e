"""The texts that :mod:`benchmarks.yardstick` scores on, from what any environment of the project has.

    help    Python's help texts: reference documentation
    code    the source of five modules of the standard library
    prose   what installed packages say of themselves: paragraphs of English sentences from their metadata
    german  a story, a recipe, a report and others, written for this benchmark: ``texts/german.txt``

None of them calibrates anything: ``spinpass export`` reads the text of its package, which shares no paragraph with
these. The rate of training and the number of windows of the recipes were chosen by tables with ``help`` and ``code`` in
them; ``prose`` and ``german`` came later and are only reported. ``help``, ``code`` and ``prose`` change with the
versions that are installed: rows are compared within one environment.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import re
import statistics
import tarfile
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from inspect import getsource
from pathlib import Path
from pydoc_data.topics import topics

import typer

from spinpass.evaluation import read_text

MODULES = (csv, difflib, statistics, argparse, tarfile)  # code to predict
GERMAN = Path(__file__).with_name("texts") / "german.txt"
_LINK = re.compile(r"\[([^\]\[]+)\]\([^)]*\)")  # of Markdown
_SENTENCES = re.compile(r"[A-Z][a-z' ].{118,}[.!?]")  # long enough for a paragraph
_MARKUP = re.compile(r"https?:|::|\*\*|`_|[|<>{}\[\]=#\\]")


def scored_texts(named: Sequence[str] = ()) -> dict[str, str]:
    """The texts by name, and those of the files that ``NAME=FILE`` names.

    Raises BadParameter where one is spelled otherwise, ConfigError where a file cannot be read.
    """
    found = {
        "help": "\n\n".join(topics.values()),
        "code": "\n\n".join(map(getsource, MODULES)),
        "prose": "\n\n".join(dict.fromkeys(_paragraphs())),
        "german": read_text(GERMAN),
    }
    for each in named:
        name, _, path = each.partition("=")
        if not path:
            raise typer.BadParameter(f"{each!r} is not NAME=FILE", param_hint="--text")
        found[name] = read_text(Path(path))
    return found


def _paragraphs() -> Iterator[str]:
    """Paragraphs of sentences without markup, from the descriptions of all packages but this one."""
    described = {d.name.lower(): d.metadata.get_all("Description") or [""] for d in distributions() if d.name}
    described.pop("spinpass", None)
    for _, (text, *_) in sorted(described.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            line = _LINK.sub(r"\1", " ".join(paragraph.split()))
            if _SENTENCES.fullmatch(line) and not _MARKUP.search(line):
                yield line
