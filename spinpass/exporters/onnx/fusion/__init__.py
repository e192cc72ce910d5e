"""Fusion into ONNX Runtime's own operators: attention with a cache, rotary embeddings, norms."""
