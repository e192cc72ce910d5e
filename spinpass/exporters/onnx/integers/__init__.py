"""Integers in ONNX files: constants as weights of two to eight bits, caches of eight or four."""
