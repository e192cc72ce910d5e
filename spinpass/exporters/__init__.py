"""Ways out of torch: a package or a module for each runtime.

This package imports none of them, and so none of their dependencies, before it is asked for one.
"""

from .certified_file import CERTIFY_BYTES, resident_bytes
from .names import cache_names, named_record

__all__ = ["CERTIFY_BYTES", "cache_names", "named_record", "resident_bytes"]
