"""The model zoo: every causal language model type that transformers knows, tiny, random, exported, rotated, certified.

``python -m benchmarks.zoo.sweep`` measures and keeps one record per type, ``python -m benchmarks.zoo.coverage`` writes
COVERAGE.md from the records. The pass itself knows no model names; this package is where they are allowed.
"""
