"""How programs, checkpoints and folders lie on disk, and how files appear there whole."""

from .archives import check_archive
from .documents import read_object
from .draft import Draft, drafted
from .gguf_header import GgufHeader, GgufTensor, check_gguf
from .gptq import QUANTIZE_CONFIG, GptqCheckpoint, GptqReport, read_gptq, write_gptq
from .manifest import (
    CACHE_BUFFERS,
    MANIFEST,
    READS_PADDING,
    Artefact,
    check_checkpoint,
    check_companions,
    check_loaded,
    check_made_of,
    check_opened,
    hashes,
    listed_files,
    onnx_record,
    read_artefact,
    read_manifest,
    sealed,
)
from .matrices import read_matrices
from .paths import (
    EXTERNAL_BYTES,
    PROTOBUF_LIMIT,
    data_name,
    model_path,
    pte_path,
    remove_stale_data,
    runtime_file,
    xml_path,
)
from .people import README, is_for_people
from .pt2 import load_program, save_program
from .recorded import FileHash, check_recorded
from .safetensors_header import check_safetensors, safetensors_header
from .shards import write_shards
from .staging import PREFIX, check_free, finish, is_plain_name, staged
from .work import KeptWork

__all__ = [
    "CACHE_BUFFERS",
    "EXTERNAL_BYTES",
    "MANIFEST",
    "PREFIX",
    "PROTOBUF_LIMIT",
    "QUANTIZE_CONFIG",
    "README",
    "READS_PADDING",
    "Artefact",
    "Draft",
    "FileHash",
    "GgufHeader",
    "GgufTensor",
    "GptqCheckpoint",
    "GptqReport",
    "KeptWork",
    "check_archive",
    "check_checkpoint",
    "check_companions",
    "check_free",
    "check_gguf",
    "check_loaded",
    "check_made_of",
    "check_opened",
    "check_recorded",
    "check_safetensors",
    "data_name",
    "drafted",
    "finish",
    "hashes",
    "is_for_people",
    "is_plain_name",
    "listed_files",
    "load_program",
    "model_path",
    "onnx_record",
    "pte_path",
    "read_artefact",
    "read_gptq",
    "read_manifest",
    "read_matrices",
    "read_object",
    "remove_stale_data",
    "runtime_file",
    "safetensors_header",
    "save_program",
    "sealed",
    "staged",
    "write_gptq",
    "write_shards",
    "xml_path",
]
