"""What the site makes of the code: the page of the command line, the list of schemes, the examples, the notebooks, and
the glossary's tips.

Named in ``mkdocs.yml`` as a hook. A page writes ``<!-- made: NAME -->`` where one of these is to stand.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

from spinpass.cli import app as commands
from spinpass.folders import BITS, measured, recipe_of
from spinpass.quantization import ALIASES, PARTS

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
_MARK = re.compile(r"^<!-- made: ([a-z ]+) -->$", re.M)
_TERM = re.compile(r"^\| \*\*(.+?)\*\* \| (.+?) \|$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made, and explain the words of the glossary wherever they stand."""
    made = {"command line": command_line, "schemes": schemes, "examples": examples, "notebooks": notebooks}
    filled = _MARK.sub(lambda found: made[found[1]](), markdown)
    tips = [f"*[{term}]: {meaning}" for term, meaning in terms().items()]
    return "\n".join([filled, "", *tips, ""])


def terms() -> dict[str, str]:
    """Return the words of the glossary with what they mean, without markup."""
    found: dict[str, str] = {}
    for words, meaning in _TERM.findall(GLOSSARY.read_text(encoding="utf-8")):
        plain = re.sub(r"\[([^]]+)\]\([^)]+\)|[`*]", r"\1", meaning)
        found |= {word.strip(): plain for word in words.split(",")}
    return found


def command_line() -> str:
    """Return a section for each command: what it does, an example, and a table of its options."""
    known: Any = typer.main.get_command(commands.app)
    callbacks = {each.name: each.callback for each in commands.app.registered_commands}
    return "\n".join(_command(name, each, callbacks[name]) for name, each in known.commands.items())


def _command(name: str, command: Any, callback: Any) -> str:
    kinds = inspect.signature(callback, eval_str=True).parameters
    told = inspect.cleandoc(command.help or "")
    about, *examples = re.split(r"(?m)^Examples?: ?", told)
    lines = [f"## spinpass {name}", "", about.strip(), ""]
    for example in examples:
        lines += ["```console", *(f"$ {' '.join(each.split())}" for each in example.strip().splitlines()), "```", ""]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    if arguments:
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| `{each.metavar or each.name.upper()}` | {_cell(each.help)} |" for each in arguments]
        lines.append("")
    boxes: dict[str | None, list[Any]] = {None: []}  # those that --help shows, in its order
    for each in options:
        boxes.setdefault(getattr(each, "rich_help_panel", None), []).append(each)
    for box, held in boxes.items():
        lines += [f"| {box or 'option'} | value | unless given | what it does |", "| --- | --- | --- | --- |"]
        for each in held:
            cells = _names(each), _values(each, kinds[each.name].annotation), _default(each), _cell(each.help)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, ""])


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|").replace("*", r"\*")


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _values(option: Any, kind: Any) -> str:
    """Return what an option takes: what its metavar says, or its choices, or its type."""
    if option.is_flag or option.count:
        return ""
    named = option.metavar.split("|") if option.metavar else choices(kind) or [_plain(kind)]
    return " ".join(f"`{value}`" for value in named)


def choices(kind: Any) -> list[str]:
    """Return the values of the Literal in an annotation; none where it has no Literal."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [value for part in get_args(kind) for value in choices(part)]


def _plain(kind: Any) -> str:
    names = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "FILE"}
    parts = [kind]
    while parts:
        part = parts.pop(0)
        if part in names:
            return names[part]
        parts += [each for each in get_args(part) if isinstance(each, type) or get_origin(each) is not None]
    return "VALUE"


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return _cell(option.show_default)
    if option.is_flag or option.count or option.default in (None, "", ()) or callable(option.default):
        return "required" if option.required else ""
    return f"`{option.default}`".replace("|", r"\|").replace("*", r"\*")


def schemes() -> str:
    """Return the tables of ``spinpass schemes``."""
    lines = ["| part | meaning | in ONNX Runtime |", "| --- | --- | --- |"]
    lines += [f"| `{part.example}` | {_cell(part.meaning)} | {_cell(part.runs_as)} |" for part in PARTS]
    lines += ["", "These names stand for schemes. Further parts may follow."]
    lines += ["", "| name | stands for |", "| --- | --- |"]
    lines += [f"| `{name}` | `{scheme}` |" for name, scheme in ALIASES.items()]
    lines += ["", "These are the recipes for ONNX Runtime."]
    lines += ["", "| `--bits` | scheme | MB | perplexity ÷ float |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(_recipe(bits) for bits in BITS), "", f"Measured on: {measured()['about']}.", ""])


def _recipe(bits: int) -> str:
    scheme = recipe_of("auto", bits, "onnx").scheme
    spelled = f"`{scheme}`" if scheme else "the values as they are loaded"
    row = measured()["rows"].get(str(bits))
    told = f"{row['mb']:.1f} | {row['mean']:.3f}, worst text {row['worst']:.3f}" if row else "|"
    return f"| {bits} | {spelled} | {told} |"


def examples() -> str:
    """Return a section for each script of ``examples/``: what it shows, and the script. What they share comes last."""
    paths = sorted((ROOT / "examples").glob("*.py"))  # those with numbers come first
    return "\n".join(_example(path) for path in paths)


def _example(path: Path) -> str:
    code = path.read_text(encoding="utf-8").rstrip()
    told = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0].replace("``", "`")
    return "\n".join([f"## {path.name}", "", " ".join(told.split()), "", "```python", code, "```", ""])


def notebooks() -> str:
    """Return a section for each notebook of ``notebooks/``: its text and its code, without what running it shows."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return "\n".join(_notebook(json.loads(path.read_text(encoding="utf-8"))) for path in paths)


def _notebook(book: dict[str, Any]) -> str:
    lines: list[str] = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        shown = ["```python", text, "```"] if cell["cell_type"] == "code" else [re.sub(r"(?m)^#", "##", text)]
        lines += [*shown, ""]
    return "\n".join(lines)
