"""Ways out of torch: a package or a module for each runtime.

Importing this package imports none of them, so none of their dependencies.
"""

from .names import cache_names

__all__ = ["cache_names"]
