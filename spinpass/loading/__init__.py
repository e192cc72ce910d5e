"""Whatever a user names, a folder, a name on the hub, a GGUF file or a program, becomes a program."""

from .dequantize import dequantize_checkpoint, quantized_checkpoint
from .faithful import LOGIT_BOUNDS, LONGEST_TEXT, text_limits
from .files import SourceFiles
from .gptq import declared_online
from .models import Companions, LoadedModel, check_dtype, load_config, load_model, load_tokenizer
from .papers import Papers, papers_of
from .reloaded import apply_declared_transforms, reloaded_logits
from .rotated import declaration
from .sources import Source, check_program_options, locate
from .static_cache import check_context, export_static_cache
from .stored_size import StoredModel, count_values, stored_model
from .streamed import STREAMED_BYTES
from .tensors import LoadingReport

__all__ = [
    "LOGIT_BOUNDS",
    "LONGEST_TEXT",
    "STREAMED_BYTES",
    "Companions",
    "LoadedModel",
    "LoadingReport",
    "Papers",
    "Source",
    "SourceFiles",
    "StoredModel",
    "apply_declared_transforms",
    "check_context",
    "check_dtype",
    "check_program_options",
    "count_values",
    "declaration",
    "declared_online",
    "dequantize_checkpoint",
    "export_static_cache",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "papers_of",
    "quantized_checkpoint",
    "reloaded_logits",
    "stored_model",
    "text_limits",
]
