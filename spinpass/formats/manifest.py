"""What an exported folder says about itself, and whether its parts belong together.

``spinpass.json`` holds the plan, the certificate, the hashes of every rotation, every file and itself, and versions;
whoever opens a file of the folder compares it first (:func:`check_opened`, :func:`check_companions`). The model file
itself holds the record of its rotations (:mod:`spinpass.record`) with the basis of every cache input and output.
Two artefacts may share a KV cache only if both keep it in the same basis.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinpass import record
from spinpass.errors import ConfigError, DamageError, ExportError, VerificationError, first_line
from spinpass.record import Carried

from .documents import digest, parsed
from .people import is_for_people
from .pt2 import load_program
from .staging import finish, is_plain_name

MANIFEST = "spinpass.json"
METADATA = "spinpass.record"  # the key of the record among an ONNX file's metadata
READS_PADDING = "spinpass.reads_padding"  # there where padding changes what the model makes of a text
CACHE_BUFFERS = "spinpass.cache_buffers"  # there where a cache may be longer than what is in it
_MODELS = ("model.onnx", "openvino_model.xml", "model.pte", "model.safetensors")
_SUFFIXES = {".onnx", ".xml", ".pte", ".safetensors", ".pt2"}
_WEIGHTS = _SUFFIXES | {".data", ".bin"}
_CHUNK = 2**20
_SELF = "sha256"  # the manifest's entry for itself


@dataclass(frozen=True)
class Artefact:
    """This is a model file with what lies beside it.

    ``rotations`` maps spaces to fingerprints; there are none where nothing is rotated. ``bases`` has an entry for every
    cache input and output that is not in the original basis, by its name in the file. ``manifest`` is empty where the
    file stands alone.
    """

    path: Path
    rotations: Mapping[str, str]
    bases: Mapping[str, Carried]
    manifest: Mapping[str, Any]

    def check(self, *, files: bool = False) -> None:
        """Check that the model is the one that the manifest describes, and every rotation the one that its hash says.

        The model file is read whole and its hash compared, of other files the size; ``files`` reads those as well, and
        what is for people, who may have edited it. Raises VerificationError, naming what differs.
        """
        self.check_rotations()
        listed = self.manifest.get("files", {})
        listed = listed if files else {name: stated for name, stated in listed.items() if not is_for_people(name)}
        _compare(self.path.parent, listed, lambda name: files or name == self.path.name)

    def check_rotations(self) -> None:
        """Check the rotations as :meth:`check` does, whatever became of the other files."""
        if self.manifest:
            stated = (self.manifest.get("record") or {}).get("rotations", {})
            for space in sorted(self.rotations.keys() | stated.keys()):
                if self.rotations.get(space) != stated.get(space):
                    raise VerificationError(
                        f"{self.path} and {MANIFEST} beside it disagree about the rotation of {space}: "
                        "they come from different exports; export again"
                    )
        for name, carried in self.bases.items():
            if self.rotations.get(carried.space) != carried.rotation.fingerprint():
                raise VerificationError(
                    f"{self.path} keeps {name} in another basis ({carried.rotation}) than its rotation of "
                    f"{carried.space} has: the file was changed; export again"
                )

    def require_same_basis(self, other: Artefact) -> None:
        """Check that both may work on one KV cache. Raises VerificationError, naming one that they keep otherwise."""
        mine, theirs = self.bases, other.bases
        for name in sorted(mine.keys() | theirs.keys()):
            one, two = mine.get(name), theirs.get(name)
            if one != two:
                raise VerificationError(
                    f"{self.path} and {other.path} cannot share a cache: {name} is {_basis(one)} in the first and "
                    f"{_basis(two)} in the second; export both of one model, with the same rotations and seed"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        carried = {name: each.to_dict() for name, each in self.bases.items()}
        return {"path": str(self.path), "rotations": dict(self.rotations), "bases": carried, **self.manifest}


def read_artefact(path: str | Path) -> Artefact:
    """Read a folder that was exported, an ``.onnx`` file, or a ``.pt2`` program; no weights of ONNX files are read.

    Of files for OpenVINO and ExecuTorch, and of checkpoints, what ``spinpass.json`` says is taken. Nothing outside the
    folder is opened. An export that was killed while its files were moved there is finished first.

    Raises:
        ConfigError: nothing of that kind is there.
        VerificationError: it cannot be read, and is not the file that ``spinpass.json`` lists.
        ExportError: it cannot be read for another reason, or names a file outside the folder.
    """
    path = Path(path)
    finish(path)
    there = (inside(path, name) for name in _MODELS if (path / name).is_file())
    file = next(there, None) if path.is_dir() else path
    if file is None or not file.is_file() or file.suffix not in _SUFFIXES:
        raise ConfigError(f"there is no model at {path}: name a folder with {' or '.join(_MODELS)}, or a .pt2 file")
    if file.suffix == ".pt2":
        found = record.read(load_program(file))
        if found is None:
            return Artefact(file, {}, {}, {})
        outputs = {f"output {index}": carried for index, carried in found.outputs.items()}
        return Artefact(file, found.rotations, {**found.inputs, **outputs}, {})
    manifest = _manifest(file)
    if file.suffix == ".onnx":
        try:
            return Artefact(file, *onnx_record(file, _onnx_metadata(file)), manifest)
        except ExportError:
            check_opened(file)  # damage that the manifest knows of is named as that
            raise
    stated = manifest.get("record") or {}
    bases = _bases(file, stated) if file.suffix == ".xml" and stated else {}
    return Artefact(file, stated.get("rotations", {}), bases, manifest)


def check_loaded(file: Path, metadata: Mapping[str, str]) -> None:
    """Check an ONNX file with this metadata, which a runtime has just loaded.

    Raises:
        VerificationError: it does not carry the rotations that it and the manifest beside it name.
        ExportError: either cannot be read.
    """
    Artefact(file, *onnx_record(file, metadata), _manifest(file)).check_rotations()


def check_opened(model: Path) -> None:
    """Compare a model file that is about to be opened, and its weights, with what the manifest beside it lists.

    Nothing is compared where there is no manifest, or one that does not list the file.

    Raises:
        VerificationError: a file is missing or not the one that is listed.
        DamageError: the manifest is not as it was written.
    """
    mine = f"{model.stem}."
    listed = {name: stated for name, stated in _manifest(model).get("files", {}).items() if name.startswith(mine)}
    _compare(model.parent, listed, lambda name: True)


def check_companions(folder: Path, *names: str) -> None:
    """Compare files beside a model that are about to be read, all of them or those named, as :func:`check_opened`."""
    listed = {
        name: stated
        for name, stated in read_manifest(folder).get("files", {}).items()
        if (name in names if names else Path(name).suffix not in _WEIGHTS and not is_for_people(name))
    }
    _compare(folder, listed, lambda name: True)


def check_checkpoint(folder: Path) -> None:
    """Compare every file of an exported folder but those for people, as :func:`check_opened`; nothing where there is no
    manifest."""
    listed = read_manifest(folder).get("files", {})
    _compare(folder, {name: stated for name, stated in listed.items() if not is_for_people(name)}, lambda name: True)


def check_made_of(exported: Path, source: Path) -> None:
    """Compare the files of a model, a file or folder here, with those that an exported folder, or that of an exported
    file, says it was made of.

    Nothing is compared where nothing was recorded, or where the model has no file of that name.

    Raises:
        ConfigError: it was made of another model.
    """
    folder = exported if exported.is_dir() else exported.parent
    made_of = read_manifest(folder).get("source", {}).get("files", {})
    for name, stated in made_of.items():
        file = source if source.is_file() else source / name
        if file.name != name or not file.is_file() or not _is_file_entry(stated):
            continue
        if file.stat().st_size != stated["bytes"] or sha256(file) != stated["sha256"]:
            raise ConfigError(f"{folder} was made of another {name} than that of {source}: name its own model")


def _compare(folder: Path, listed: Mapping[str, Any], read: Callable[[str], bool]) -> None:
    for name, stated in listed.items():
        file = inside(folder, name)
        if not file.is_file():
            raise VerificationError(f"{folder} lacks {name}, which {MANIFEST} lists: copy all of it")
        if file.stat().st_size != stated["bytes"] or (read(name) and sha256(file) != stated["sha256"]):
            raise VerificationError(
                f"{file} is not the file that {MANIFEST} lists: it is damaged or was changed, or they come from "
                "different exports; copy the whole folder again, or export again"
            )


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says as JSON has it, with the SHA-256 of all of it; a number that is none becomes null."""
    plain = json.loads(json.dumps(about), parse_constant=lambda text: None if text == "NaN" else float(text))
    plain.pop(_SELF, None)
    return {**plain, _SELF: digest(plain)}


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the SHA-256 of files, as the manifest lists them."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def listed_files(folder: Path) -> set[str]:
    """Return the names that the ``spinpass.json`` of a folder lists, and its own; none where there is none.

    A file for people that is no longer what is listed is somebody's own, and left out.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {MANIFEST, *(name for name in listed if is_plain_name(name) and not _was_edited(folder, name, listed))}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _was_edited(folder: Path, name: str, listed: Mapping[str, Any]) -> bool:
    file = folder / name
    if not is_for_people(name) or not _is_file_entry(listed[name]) or not file.is_file():
        return False
    return bool(sha256(file) != listed[name]["sha256"])


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that something in the folder names. Raises ExportError where it leads out of it."""
    file = folder / name
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise ExportError(f"{name!r} leads out of {folder}, so it is not opened: copy the file into the folder")
    return file


def _onnx_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file. Raises ExportError where it names data outside its folder."""
    try:
        import onnx

        model = onnx.load(file, load_external_data=False)
    except ModuleNotFoundError as error:
        raise ExportError(f"reading ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    except Exception as error:  # protobuf's errors have no common base
        raise ExportError(f"{file} is no ONNX model ({first_line(error)}): export it again") from error
    for location in _data_files(model):
        inside(file.parent, location)
    return {entry.key: entry.value for entry in model.metadata_props}


def _data_files(model: Any) -> set[str]:
    """Return the names of the files in which tensors of an ONNX model lie, those of inner graphs and functions too."""
    found: set[str] = set()
    todo = [model]
    while todo:
        message = todo.pop()
        if message.DESCRIPTOR.name == "TensorProto":
            found |= {entry.value for entry in message.external_data if entry.key == "location"}
        else:
            for field, value in message.ListFields():
                if field.message_type is not None:
                    todo += [value] if hasattr(value, "ListFields") else value
    return found


def onnx_record(file: Path, metadata: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Carried]]:
    """Return the rotations and bases that the file's metadata hold; outputs have names there in place of numbers.

    Raises ExportError where they are not as spinpass writes them.
    """
    stored = metadata.get(METADATA)
    if stored is None:
        return {}, {}
    try:
        data = json.loads(stored)
        return dict(data["rotations"]), _bases(file, data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ExportError(_unreadable(file, error)) from error


def _bases(file: Path, data: Mapping[str, Any]) -> dict[str, Carried]:
    """Return the basis of each cache input and output that a record has by name. Raises ExportError as above."""
    try:
        return {name: Carried.from_dict(each) for side in ("inputs", "outputs") for name, each in data[side].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ExportError(_unreadable(file, error)) from error


def _unreadable(file: Path, error: Exception) -> str:
    return f"{file} has a record of rotations that cannot be read ({error}): export it again"


def _manifest(model: Path) -> Mapping[str, Any]:
    """Read the manifest of the folder of ``model``; it is empty where there is none, or one that does not list it."""
    found = read_manifest(model.parent)
    return found if model.name in found.get("files", {}) else {}


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """Read ``spinpass.json`` of a folder; it is empty where there is none. Raises DamageError where it was changed."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        found = parsed(inside(folder, MANIFEST).read_bytes(), str(file))
    except OSError as error:
        raise DamageError(f"{file} cannot be read ({error}): export the folder again") from error
    if not _is_manifest(found):
        raise DamageError(f"{file} is not what spinpass writes: export the folder again")
    stated = found.pop(_SELF, None)
    if stated != digest(found):
        raise DamageError(
            f"{file} is not as it was written ({'its SHA-256 differs' if stated else 'it has no SHA-256 of itself'}): "
            "copy it again, or export the folder again"
        )
    for name, entry in found.get("files", {}).items():
        if not is_plain_name(name):
            raise DamageError(f"{file} lists {name!r}, which is no file of its folder: export the folder again")
        if not _is_file_entry(entry):
            raise DamageError(
                f"{file} is not what spinpass writes: it has no size and SHA-256 for {name}; export the folder again"
            )
    return {**found, _SELF: stated}


def _is_manifest(found: Any) -> bool:
    """Say whether what is read of a manifest here is of the kinds that spinpass writes."""
    if not isinstance(found, dict) or not isinstance(found.get("record") or {}, dict):
        return False
    parts = (found.get("record") or {}).get("rotations", {}), found.get("files", {})
    return all(isinstance(part, dict) for part in parts)


def _is_file_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and (type(entry.get("bytes")), type(entry.get("sha256"))) == (int, str)


def _basis(carried: Carried | None) -> str:
    if carried is None:
        return "in the original basis"
    return f"rotated by {carried.rotation} ({carried.space}, {carried.rotation.fingerprint()[:16]}…)"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file. Raises DamageError where it cannot be read."""
    found = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                found.update(chunk)
    except OSError as error:
        raise DamageError(f"{file} cannot be read: {error.strerror or error}") from error
    return found.hexdigest()
