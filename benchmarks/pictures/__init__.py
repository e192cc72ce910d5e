"""The pictures of the documentation, drawn from the code that they are about: ``python -m benchmarks.pictures``."""
