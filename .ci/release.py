"""What a release must pass: built, looked into, installed outside the tree, used; each extra alone, and all together.

    python .ci/release.py OUT             wheel and sdist in OUT; light extras are installed, the others resolved
    python .ci/release.py OUT --every     every extra is installed, one after the other (about a gigabyte at a time)

Environments are made in a temporary folder and removed. What does not hold ends the run with the reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
BESIDE = {
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg",
}  # fmt: skip

# What an extra is for: importing it fails where a package is missing. All of an extra are imported in one process.
IMPORTS = {
    "all": ("spinpass.cli.app", "spinpass.hosts.olive", "spinpass.exporters.openvino", "spinpass.exporters.executorch"),
    "browser": ("PySide6.QtWebEngineCore",),
    "cli": ("spinpass.cli.app",),
    "compressed-tensors": ("compressed_tensors", "spinpass.loading"),
    "datasets": ("datasets",),
    "demo": ("spinpass.cli.app", "spinpass.exporters.onnx", "spinpass.loading"),
    "dev": ("hypothesis", "mypy", "pytest", "xdist", "spinpass.cli.app"),
    "notebooks": ("nbclient", "ipykernel", "onnxruntime", "spinpass.reporting"),
    "docs": ("mkdocs", "mkdocstrings", "material", "spinpass.cli.app"),
    "executorch": ("spinpass.exporters.executorch",),
    "genai": ("onnxruntime_genai",),
    "olive": ("spinpass.hosts.olive",),
    "onnx": ("spinpass.exporters.onnx", "onnxruntime"),
    "openvino": ("spinpass.exporters.openvino",),
    "optimum": ("optimum.commands.register.register_spinpass",),
    "report": ("spinpass.reporting", "rich"),
    "torchao": ("torchao",),
    "transformers": ("spinpass.exporters.transformers", "spinpass.loading"),
}
LIGHT = ("cli", "onnx", "report", "transformers")

ROTATION = """
import torch, spinpass

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down, self.head = (
            torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 50)
        )
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(32), torch.nn.RMSNorm(32)])

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norms[0](x))))
        return self.head(self.norms[1](x))

torch.manual_seed(0)
program = torch.export.export(Block().eval(), (torch.randint(0, 50, (1, 7)),))
found = spinpass.rotate(program)
assert found.plan.spaces, found.plan
assert found.certificate.ok, found.certificate
print(f"{len(found.plan.spaces)} rotated, {found.certificate.verdict}, from {spinpass.__file__}")
"""


class ReleaseError(Exception):
    """Something that a release must pass does not hold."""


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command and return what it prints. Raises ReleaseError where it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def environment(folder: Path, *packages: object) -> Path:
    """Return the Python of a new environment with these packages, of the versions that are tested."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if packages:
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *packages)
    return python


def owned() -> set[str]:
    """Return the files of the packages, as git lists them."""
    return set(run("git", "ls-files", "spinpass", "optimum", cwd=ROOT).splitlines())


def misplaced(packed: set[str], expected: set[str]) -> list[str]:
    """Return what is packed and should not be, and what is not and should, each with a sign before it."""
    return sorted([f"+{name}" for name in packed - expected] + [f"-{name}" for name in expected - packed])


def contents(wheel: Path, source: Path) -> None:
    """Raise ReleaseError where a file of the packages is in neither, or another file is in one of them."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    if wrong := misplaced(packed, owned()):
        raise ReleaseError(f"{wheel.name}: {', '.join(wrong)}")
    with tarfile.open(source) as tar:
        packed = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    packed = {name for name in packed if ".egg-info/" not in name}
    if wrong := misplaced(packed, owned() | BESIDE):
        raise ReleaseError(f"{source.name}: {', '.join(wrong)}")


def built(out: Path, scratch: Path) -> tuple[Path, Path]:
    """Build sdist and wheel, the wheel out of the sdist, check what a registry shows of them, and return both."""
    tools = environment(scratch / "tools")
    run(tools, "-m", "pip", "install", "--quiet", "build", "twine")
    for old in (*out.glob("spinpass-*.whl"), *out.glob("spinpass-*.tar.gz")):
        old.unlink()
    run(tools, "-m", "build", "--outdir", out, ROOT)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    run(tools, "-m", "twine", "check", "--strict", wheel, source)
    contents(wheel, source)
    return wheel, source


def used(python: Path, scratch: Path) -> str:
    """Rotate a tiny program with an installed package, away from the tree, and return what was said."""
    said = run(python, "-c", ROTATION, cwd=scratch).strip()
    if str(ROOT) in said:
        raise ReleaseError(f"the tree was used, not what is installed: {said}")
    return said.partition(", from")[0]


def alone(extra: str, wheel: Path, scratch: Path, *, really: bool) -> str:
    """Resolve or install one extra in an environment of its own; where it is installed, import what it is for."""
    what = f"spinpass[{extra}] @ {wheel.as_uri()}"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:  # some extras take gigabytes
        python = environment(Path(folder))
        install = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        if not really:
            run(*install, "--dry-run", what)
            return "resolves"
        run(*install, what)
        run(python, "-m", "pip", "check")
        run(python, "-c", "".join(f"import {name}\n" for name in IMPORTS[extra]), cwd=scratch)
        return "installed, imported"


def main() -> None:
    """Run all of it, and say a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="where wheel and sdist are left")
    parser.add_argument("--every", action="store_true", help="install every extra, not the light ones alone")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spinpass-release-") as name:
        scratch = Path(name)
        wheel, source = built(asked.out.resolve(), scratch)
        print(f"{wheel.name}, {source.name}: built, checked, complete", flush=True)
        cli = environment(scratch / "wheel", f"spinpass[cli] @ {wheel.as_uri()}")
        version = run(cli.parent / "spinpass", "--version", cwd=scratch).strip()
        if wheel.name.split("-")[1] != version.split()[1].rstrip(","):
            raise ReleaseError(f"{wheel.name} says that it is {version}")
        print(f"wheel: {version}: {used(cli, scratch)}", flush=True)
        print(f"sdist: {used(environment(scratch / 'sdist', source), scratch)}", flush=True)
        for extra in EXTRAS:
            print(f"{extra}: {alone(extra, wheel, scratch, really=asked.every or extra in LIGHT)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ReleaseError as error:
        sys.exit(f"release: {error}")
