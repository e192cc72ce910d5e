"""How programs, checkpoints and folders lie on disk, and how files appear there whole."""

from .archives import check_archive
from .compressed_tensors import (
    COMPRESSED_TENSORS,
    CompressedCheckpoint,
    CompressedReport,
    compressed_codes,
    read_compressed_tensors,
    write_compressed_tensors,
)
from .documents import read_object
from .draft import Draft, drafted
from .gguf_header import GgufHeader, GgufTensor, check_gguf
from .gptq import QUANTIZE_CONFIG, GptqCheckpoint, GptqReport, gptq_codes, read_gptq, read_tensors, write_gptq
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
    sha256,
)
from .matrices import read_matrices, write_matrices
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
from .plans import load_plan, save_plan
from .pt2 import load_program, save_program
from .recorded import FileHash, check_recorded
from .safetensors_header import check_safetensors, safetensors_header
from .shards import write_shards
from .staging import PREFIX, check_free, finish, is_plain_name, staged
from .transform_config import (
    DeclaredTransform,
    declared_transforms,
    is_transform,
    online_alone,
    resolved_transforms,
    transform_config,
)
from .work import KeptWork

__all__ = [
    "CACHE_BUFFERS",
    "COMPRESSED_TENSORS",
    "EXTERNAL_BYTES",
    "MANIFEST",
    "PREFIX",
    "PROTOBUF_LIMIT",
    "QUANTIZE_CONFIG",
    "README",
    "READS_PADDING",
    "Artefact",
    "CompressedCheckpoint",
    "CompressedReport",
    "DeclaredTransform",
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
    "compressed_codes",
    "data_name",
    "declared_transforms",
    "drafted",
    "finish",
    "gptq_codes",
    "hashes",
    "is_for_people",
    "is_plain_name",
    "is_transform",
    "listed_files",
    "load_plan",
    "load_program",
    "model_path",
    "online_alone",
    "onnx_record",
    "pte_path",
    "read_artefact",
    "read_compressed_tensors",
    "read_gptq",
    "read_manifest",
    "read_matrices",
    "read_object",
    "read_tensors",
    "remove_stale_data",
    "resolved_transforms",
    "runtime_file",
    "safetensors_header",
    "save_plan",
    "save_program",
    "sealed",
    "sha256",
    "staged",
    "transform_config",
    "write_compressed_tensors",
    "write_gptq",
    "write_matrices",
    "write_shards",
    "xml_path",
]
