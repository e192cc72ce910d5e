"""The operators of spinpass in ONNX: how each is translated, and what it becomes when the graph is optimised."""
