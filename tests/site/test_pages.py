"""The site: it builds strictly, every public name has an entry, every command is on its page, no abbreviation is unexplained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.imports import ROOT, exported, modules, parsed

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README_BYTES = 6000
FENCES = {"console", "python", "text", "json", "yaml"}
# what needs no explanation: units, languages, what is read as a name and not as an abbreviation
COMMON = {
    "MODEL", "OUT", "OTHER", "ROTATED", "TEXT", "FILE", "PATTERN", "SCHEME", "NAME", "DATASET", "SHARED", "SPACE", "DIR",
    "NVIDIA", "README", "COVERAGE", "DESIGN", "CHANGELOG", "LICENSE", "HTML", "IR", "SHA", "X",
}  # fmt: skip


def faces() -> dict[str, tuple[str, ...]]:
    """What others may use: by module, the names it exports. Packages list them; of a module they are its public names."""
    found: dict[str, tuple[str, ...]] = {}
    for module, path in modules(ROOT).items():
        parts = module.split(".")
        if parts[0] != "spinpass" or any(part.startswith("_") for part in parts[1:]) or module == "spinpass.cli":
            continue
        if path.name == "__init__.py" and (len(parts) < 3 or parts[1] == "exporters"):
            found[module] = tuple(sorted(exported(module)))
        elif path.name != "__init__.py" and len(parts) == 2:
            found[module] = tuple(defined(path))
    return {module: names for module, names in found.items() if names}


def defined(path: Path) -> Iterator[str]:
    """The public functions, classes and constants that a file defines."""
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = [ast.unparse(t) for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
        else:
            continue
        yield from (name for name in names if name.isidentifier() and not name.startswith("_"))


def without_a_page(names: dict[str, tuple[str, ...]], site: Path) -> list[str]:
    """The public names that the built site's inventory does not lead to."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    known = {line.split(" ")[0] for line in inventory.splitlines()}
    known |= {name.rpartition(".")[0] for name in known}  # a module that has a page
    return [f"{module}.{name}" for module, each in names.items() for name in each if f"{module}.{name}" not in known]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it, into a folder of its own."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


def test_every_public_name_has_an_entry(site: Path) -> None:
    names = faces()
    assert {"spinpass", "spinpass.quantization", "spinpass.exporters.onnx", "spinpass.errors"} <= names.keys()
    assert not (missing := without_a_page(names, site)), f"no entry under docs/reference/api: {', '.join(missing)}"


def test_a_name_without_an_entry_is_seen(site: Path) -> None:
    assert without_a_page({"spinpass": ("plan", "guess")}, site) == ["spinpass.guess"]
    assert without_a_page({"spinpass.graph.editor": ("ProgramEditor", "nothing")}, site) == ["spinpass.graph.editor.nothing"]


def test_roles_of_docstrings_are_links(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference/api").rglob("index.html")]
    left = {found for text in pages for found in re.findall(r":(?:func|class|meth|mod|data|attr|obj):", text)}
    assert not left
    assert any('href="../spinpass.quantization/#spinpass.quantization.quantize"' in text for text in pages)


def test_the_command_line_is_on_its_page(site: Path) -> None:
    import typer.main

    from spinpass.cli import app as commands

    text = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    known = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
    for name, command in known.items():
        assert f'id="spinpass-{name}"' in text, name
        absent = [option for param in command.params for option in param.opts if option.startswith("-") and f"<code>{option}</code>" not in text]
        assert not absent, f"spinpass {name}: {absent}"
    schemes = (site / "how-to/choose-a-scheme/index.html").read_text(encoding="utf-8")
    assert "<!-- made" not in text + schemes and "<td><code>w4g64</code></td>" in schemes


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A page\n\n[gone](gone.md)\n")
    rules = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = rules[rules.index("validation:") : rules.index("markdown_extensions:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: a site\nstrict: true\n{validation}")
    command = [sys.executable, "-m", "mkdocs", "build"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode != 0 and "gone.md" in built.stderr


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size < README_BYTES


def fences(text: str) -> list[tuple[str, list[str]]]:
    """The language and the lines of each block of a page."""
    return [(kind, body.splitlines()) for kind, body in re.findall(r"(?ms)^```(\S*)[^\n]*\n(.*?)^```$", text)]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_blocks_are_of_kinds_that_are_tested(page: Path) -> None:
    """Python runs in ``test_code.py``, what follows a ``$`` in ``tests/test_commands.py``; the rest claims nothing."""
    for kind, lines in fences(page.read_text(encoding="utf-8")):
        assert kind in FENCES, f"a block of {kind or 'no kind'}: write one of {', '.join(sorted(FENCES))}"
        assert kind != "console" or any(line.startswith("$ ") for line in lines), f"a console without a command: {lines}"
        assert kind == "console" or not any(line.startswith("$ ") for line in lines), f"a command outside a console: {lines}"


def abbreviations(text: str) -> set[str]:
    """Words of capitals, perhaps with digits, outside code and links; Q4_K is a name and none of them."""
    plain = re.sub(r"(?ms)^```.*?^```$|^<!--.*?-->$|^::: .*?$", "", text)
    plain = re.sub(r"``[^`]*``|`[^`]*`|\]\([^)]*\)|https?://\S+", "", plain)
    return set(re.findall(r"(?<![\w./-])[A-Z][A-Z0-9]*[A-Z0-9](?!\w|[.-]\w*[a-z])", plain))


def glossary() -> set[str]:
    rows = re.findall(r"(?m)^\| \*\*(.+?)\*\* \|", (DOCS / "glossary.md").read_text(encoding="utf-8"))
    return {word.strip() for row in rows for word in row.split(",")}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_abbreviation_is_in_the_glossary(page: Path) -> None:
    known = glossary() | COMMON
    unknown = {word for word in abbreviations(page.read_text(encoding="utf-8")) if word not in known}
    assert not unknown, f"put into docs/glossary.md, or write in words: {', '.join(sorted(unknown))}"


def test_an_abbreviation_is_seen() -> None:
    assert abbreviations("A GPU, `NOT` an AQLM; see [X](Y.md) of W4A8\n\n```text\nZZZ\n```\n") == {"GPU", "AQLM", "W4A8"}
    listed = re.findall(r"(?m)^\| \*\*(.+?)\*\* \|", (DOCS / "glossary.md").read_text(encoding="utf-8"))
    words = [word.strip() for row in listed for word in row.split(",")]
    assert len(words) == len(glossary()) > 50, "a word twice"
