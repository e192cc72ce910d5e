"""What a user names: a model folder, a name on the hub, a GGUF file or a ``.pt2`` file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spinpass.errors import ConfigError
from spinpass.formats import MANIFEST, finish

SourceKind = Literal["program", "gguf", "transformers"]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Source:
    """It says where a model is: a ``program`` or ``gguf`` file, or a folder or name that ``transformers`` loads."""

    kind: SourceKind
    location: str
    gguf: str | None = None


def locate(model: str | Path) -> Source:
    """Decide what ``model`` names, without loading anything.

    Raises:
        ConfigError: there is no such file or folder, or it holds no model.
        ExportError: an export was killed while it moved its files there, and cannot be finished.
    """
    path = Path(model).expanduser()
    finish(path)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if not _HUB_NAME.fullmatch(str(model)) or path.suffix in (".pt2", ".gguf", ".onnx", ".safetensors"):
        shown = str(model) if str(model).isprintable() else repr(str(model))
        raise ConfigError(f"there is no file or folder {shown}: check the path")
    return Source("transformers", str(model))


def check_program_options(source: Source, **asked: bool) -> None:
    """Make sure that nothing is asked of a ``.pt2`` program that is decided when a model is exported.

    ``asked`` has the options by name, as the command line spells them but for the dashes, and whether each was given.
    Raises ConfigError.
    """
    given = [f"--{name.replace('_', '-')}" for name, was in asked.items() if was]
    if source.kind == "program" and given:
        raise ConfigError(f"{source.location} is a program, which is taken as it is: leave out {', '.join(given)}")


def _file(path: Path) -> Source:
    if path.suffix == ".pt2":
        return Source("program", str(path))
    if path.suffix == ".gguf":
        return Source("gguf", str(path.parent), path.name)
    raise ConfigError(f"{path} is neither a .pt2 nor a .gguf file: name one, or a model folder")


def _folder(path: Path) -> Source:
    if (path / "config.json").is_file() and any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return Source("transformers", str(path))
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) == 1:
        return Source("gguf", str(path), found[0])
    if (path / MANIFEST).is_file():
        raise ConfigError(
            f"{path} was exported for a runtime, and its weights are not read back: name the model that it was made of "
            f"(model, in {MANIFEST})"
        )
    if found:
        raise ConfigError(f"{path} holds several GGUF files; name one of {', '.join(found)}")
    raise ConfigError(f"{path} holds no model: neither config.json with weights nor a GGUF file; name another folder")
