"""How programs, checkpoints and folders lie on disk, and how files appear there whole."""

from .draft import Draft, drafted
from .gptq import QUANTIZE_CONFIG, GptqCheckpoint, GptqReport, read_gptq, write_gptq
from .manifest import MANIFEST, Artefact, check_loaded, hashes, listed_files, read_artefact
from .paths import PROTOBUF_LIMIT, data_name, model_path, pte_path, remove_stale_data
from .pt2 import load_program, save_program
from .staging import PREFIX, finish, staged

__all__ = [
    "MANIFEST",
    "PREFIX",
    "PROTOBUF_LIMIT",
    "QUANTIZE_CONFIG",
    "Artefact",
    "Draft",
    "GptqCheckpoint",
    "GptqReport",
    "check_loaded",
    "data_name",
    "drafted",
    "finish",
    "hashes",
    "listed_files",
    "load_program",
    "model_path",
    "pte_path",
    "read_artefact",
    "read_gptq",
    "remove_stale_data",
    "save_program",
    "staged",
    "write_gptq",
]
