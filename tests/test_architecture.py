"""Rules of the code base that no linter knows."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import spinpass
from benchmarks.imports import ROOT, TOPS, exported, imports, module_of, modules, parsed, reached
from tests.support.circles import circles

PACKAGE = Path(spinpass.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
DEMO = {PACKAGE / "cli" / "demo.py", PACKAGE / "folders" / "demo.py"}  # which is of one model, and decides nothing by that
CORE = [f for f in FILES if "exporters" not in f.relative_to(PACKAGE).parts and f not in DEMO]
CORE_PARTS = ("pipeline", "formats", "quantization", "planning", "passes", "certificate", "execution", "analysis", "operators")
ALLOWED = {"spinpass", "torch", "__future__", *sys.stdlib_module_names}
NAMES = (
    "llama",
    "qwen",
    "gemma",
    "mistral",
    "mixtral",
    "phi3",
    "phi-3",
    "gpt2",
    "gpt-2",
    "gpt_neox",
    "gptneox",
    "gptj",
    "opt-",
    "falcon",
    "starcoder",
    "stablelm",
    "olmo",
    "cohere",
    "granite",
    "bloom",
    "codegen",
    "deepseek",
    "smollm",
    "t5-",
    "bert",
    "whisper",
)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_names_no_model(path: Path) -> None:
    found = [w for w in NAMES if re.search(rf"(?<![a-z]){re.escape(w)}", path.read_text().lower())]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_have_a_purpose_and_a_docstring(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert path.read_text().lstrip().startswith(('"""', "'''", 'r"""')), f"{path} has no docstring"


PRIVATE = re.compile(
    r"torch\.(_[a-z]\w*|\w+\._[a-z]\w*)|(?<!self)(?<!cls)\._(?!_)(schema|dynamo|export|graph_module_flat|verifier)\b"
)


@pytest.mark.parametrize("path", [f for f in CORE if f.parent.name != "graph"], ids=name)
def test_only_one_file_touches_private_torch_api(path: Path) -> None:
    code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
    found = [m.group() for m in PRIVATE.finditer(code)]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize("module", CORE_PARTS)
def test_the_core_needs_torch_alone(module: str) -> None:
    foreign = {m: at for m, at in reached(f"spinpass.{module}").items() if m.split(".")[0] not in ALLOWED}
    assert not foreign, "\n".join(f"{at}: {m}" for m, at in foreign.items())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_command_line_knows_a_terminal(path: Path) -> None:
    terminals = ("typer", "rich", "click", "tqdm", "curses", "colorama", "prompt_toolkit", "readline", "getpass")
    homes = dict.fromkeys(terminals, "cli") | {"matplotlib": "nowhere"}
    for made in imports(path):
        home = homes.get(made.module.split(".")[0])
        assert home is None or name(path).startswith(home), f"{made} imports {made.module}, which belongs in {home}"


# -- rows: a package imports from rows below its own -------------------------------------------------------------------

ROWS = (
    ("cli", "hosts"),
    ("folders", "reporting", "tuning"),
    ("exporters", "evaluation"),
    ("loading", "runtime"),
    ("learned",),
    ("formats", "pipeline"),
    ("quantization", "planning"),
    ("passes", "certificate", "learning"),
    ("execution",),
    ("analysis", "operators", "record"),
    ("graph", "config", "workers"),
    ("rotations", "values"),
    ("errors", "progress", "version"),
)
ROW_OF = {part: row for row, parts in enumerate(ROWS, 1) for part in parts}
FACES = {f"spinpass.exporters.{runtime}" for runtime in ("onnx", "executorch", "openvino", "transformers")}


def part_of(module: str) -> str:
    """The part of spinpass that the module is of; ``spinpass`` itself, which exports the pipeline, ends with what learns."""
    if module == "spinpass":
        return "learned"
    return module.split(".")[1] if module.startswith("spinpass.") else ""


def upward(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of the file that do not run down."""
    mine = part_of(module_of(path, root))
    found = []
    for made in imports(path, root):
        theirs = part_of(made.module)
        if theirs and theirs != mine and ROW_OF[theirs] <= ROW_OF[mine]:
            found.append(f"row {ROW_OF[mine]} ({mine}) imports row {ROW_OF[theirs]} ({theirs}): {made}")
    return found


def test_every_part_has_a_row() -> None:
    parts = {part_of(module_of(f)) for f in FILES} - {"__main__"}
    assert parts == ROW_OF.keys()


def test_the_design_shows_these_rows() -> None:
    lines = (ROOT / "DESIGN.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    cli  "))
    for row, line in zip(ROWS, lines[start:]):
        drawn = [part.removesuffix(".py") for part in line.split() if part.removesuffix(".py") in ROW_OF]
        assert set(row) <= set(drawn[: len(row)]), f"DESIGN.md draws {line.strip()!r} where the rows have {row}"


def test_imports_run_down() -> None:
    outside = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
    found = [line for path in FILES if path not in outside for line in upward(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "up"),
    [
        ("from spinpass.planning import Planner", "row 7 (planning)"),
        ("from ..planning import Planner", "row 7 (planning)"),
        ("import spinpass.planning as p", "row 7 (planning)"),
        ("from spinpass import rotate", "row 5 (learned)"),
        ("from .. import rotate", "row 5 (learned)"),
        ("importlib.import_module('spinpass.planning')", "row 7 (planning)"),
        ("__import__('spinpass.cli')", "row 1 (cli)"),
    ],
)
def test_an_import_that_runs_up_is_seen(tmp_path: Path, line: str, up: str) -> None:
    file = tmp_path / "spinpass" / "graph" / "wrong.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"def f() -> None:\n    {line}\n")
    assert upward(file, tmp_path) == [f"row 11 (graph) imports {up}: spinpass/graph/wrong.py:2"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_product_knows_nothing_around_it(path: Path) -> None:
    around = {*TOPS, "tests"} - {"spinpass"}
    found = [f"{made}: {made.module}" for made in imports(path) if made.module.split(".")[0] in around]
    assert not [f for f in found if not f.endswith(": optimum")], "\n".join(found)


def test_every_folder_is_a_package() -> None:
    assert not [f.parent for f in FILES if not (f.parent / "__init__.py").is_file()]


@pytest.mark.parametrize("top", ["spinpass", "benchmarks"])
def test_no_circle(top: str) -> None:
    assert not circles({m for m in modules() if m.split(".")[0] == top})


def past_a_face(path: Path, open_to_it: set[str]) -> list[str]:
    """Imports of the file that reach into another part of spinpass by more than what its ``__init__`` exports."""
    mine = part_of(module_of(path))
    found = []
    for made in imports(path):
        theirs = part_of(made.module)
        face = next((f for f in FACES if made.module == f or made.module.startswith(f"{f}.")), f"spinpass.{theirs}")
        open_here = made.module in {face, "spinpass", *open_to_it}
        if theirs and theirs != mine and not open_here:
            found.append(f"{made} looks past the face of {face}: {made.module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_packages_are_entered_by_their_faces(path: Path) -> None:
    assert not past_a_face(path, set())


OUTSIDE = [f for m, f in modules().items() if m.split(".")[0] != "spinpass"]


@pytest.mark.parametrize("path", OUTSIDE, ids=module_of)
def test_benchmarks_examples_and_the_plug_in_enter_by_the_faces_too(path: Path) -> None:
    """They are command lines of their own: what draws is open to them, while the face of ``cli`` is its entry alone."""
    assert not past_a_face(path, {"spinpass.cli.screen", "spinpass.cli.tables"})


@pytest.mark.parametrize("path", [f for f in FILES if f.name == "__init__.py"], ids=name)
def test_packages_say_what_they_are_and_export(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    exported = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    inner = len(path.relative_to(PACKAGE).parts) > 2 and module_of(path) not in FACES
    assert exported or inner or path.parent.name == "exporters", f"{path} has no __all__"


# -- words: one for each thing, one thing for each -------------------------------------------------------------------

# names that several modules may define, because they are one thing for each runtime
SHARED = {"export": "a program becomes a file, spinpass.exporters.<runtime>.export"}


def public_names(path: Path) -> set[str]:
    """The classes, functions, constants and type aliases that the module defines for others."""
    found: set[str] = set()
    todo = list(parsed(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.If | ast.Try):
            todo += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {name for name in found if not name.startswith("_")}


def test_every_kind_of_definition_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "from x import Imported\nA, B = 1, 2\nC: int = 3\nD = E = list[int]\n_F = 4\nA.attribute = 5\n"
        "class G:\n    H = 6\ndef i():\n    J = 7\ntry:\n    K = 8\nexcept ImportError:\n    L = 9\nif A:\n    async def m(): ...\n"
    )
    assert public_names(file) == {*"ABCDEGiKm"}


def test_no_two_modules_define_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for each in public_names(path):
            homes.setdefault(each, []).append(name(path))
    found = {each: at for each, at in sorted(homes.items()) if len(at) > 1 and each not in SHARED}
    assert not found, "\n".join(f"{each}: {', '.join(at)}" for each, at in found.items())


def test_every_name_that_may_be_shared_is() -> None:
    homes = Counter(each for path in FILES for each in public_names(path))
    assert all(homes[each] > 1 for each in SHARED)


def test_no_public_name_hides_a_module() -> None:
    hidden = {f"spinpass.{each}" for each in spinpass.__all__} & modules().keys()
    assert not hidden, f"both a module and a name of spinpass: {', '.join(sorted(hidden))}"


def offered(module: str) -> set[str]:
    """What can be imported from a module: what it exports or defines, and the modules in it."""
    inside = {each.removeprefix(f"{module}.") for each in modules() if each.startswith(f"{module}.")}
    return set(exported(module)) | (public_names(modules()[module]) if module in modules() else set()) | inside


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_pages_name_what_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    unlinked = re.sub(r"\]\([^)]*\)", "]", text)
    for dotted in set(re.findall(r"(?<![\w./-])spinpass(?:\.\w+)+", unlinked)) - {"spinpass.json"}:
        home = dotted
        while home not in modules():
            home = home.rpartition(".")[0]
        name_ = dotted.removeprefix(home).removeprefix(".").split(".")[0]  # of a class, not what it has
        assert not name_ or name_ in offered(home), f"{page.name}: there is no {dotted}"
    for module, names in re.findall(r"^ *from (spinpass[\w.]*) import (.+)$", text, re.M):
        missing = {each.split(" as ")[0] for each in re.split(r",\s*", names)} - offered(module)
        assert not missing, f"{page.name}: {module} has no {', '.join(missing)}"
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / path).exists(), f"{page.name}: there is no {path}"


# -- sizes -------------------------------------------------------------------------------------------------------------

ALONE, LONGEST, LONGEST_CLASS = 9, 450, 320


def test_few_modules_stand_alone() -> None:
    alone = sorted(f.name for f in PACKAGE.glob("*.py") if f.stem not in ("__init__", "__main__"))
    assert len(alone) <= ALONE, f"{len(alone)} files directly in spinpass: {', '.join(alone)}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_module_is_too_long_to_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{name(path)} has {lines} lines, {LONGEST} are allowed"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_class_is_too_long_to_read(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGEST_CLASS, f"{name(path)}: {node.name} has {lines} lines, {LONGEST_CLASS} are allowed"


# -- the surface -------------------------------------------------------------------------------------------------------


def test_modules_import_without_the_extras() -> None:
    import subprocess

    code = (
        "import sys\nfor m in ('transformers','onnx','onnxscript','onnxruntime','typer','rich','openvino','executorch','torchao','matplotlib','datasets','optimum','olive'): sys.modules[m] = None\n"
        "import spinpass, spinpass.record, spinpass.operators.hadamard\nprint(len(spinpass.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_api() -> None:
    assert sorted(spinpass.__all__) == [
        "Certificate",
        "ConfigError",
        "ExportError",
        "InvariantError",
        "Learned",
        "Learning",
        "LearningError",
        "Override",
        "ProgramError",
        "QuantizedWeightError",
        "RefusedError",
        "Rotated",
        "Rotation",
        "RotationConfig",
        "RotationPlan",
        "SpinpassError",
        "VerificationError",
        "learn",
        "load_plan",
        "lower",
        "materialize",
        "on_device",
        "plan",
        "rotate",
        "save_plan",
        "transform",
        "verify",
    ]
    assert all(hasattr(spinpass, n) for n in spinpass.__all__)
    assert all(getattr(spinpass, n).__doc__ for n in spinpass.__all__)


def test_every_error_is_of_the_family() -> None:
    errors = [getattr(spinpass, n) for n in spinpass.__all__ if n.endswith("Error")]
    assert all(issubclass(e, spinpass.SpinpassError) for e in errors)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_bare_exceptions_and_no_machine_paths(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"raise Exception\(|except:\s*$|except BaseException", text, re.M)
    assert not re.search(r"/tmp/|/work/|/root/", text)
