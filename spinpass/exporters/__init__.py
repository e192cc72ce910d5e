"""Ways out of torch: a package or a module for each runtime.

This package imports none of them, and so none of their dependencies, before it is asked for one.
"""

from .names import cache_names, named_record

__all__ = ["cache_names", "named_record"]
