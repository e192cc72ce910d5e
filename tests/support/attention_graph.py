"""A decoder of one layer whose cache lies in ONNX Runtime's attention kernel, for runtimes that share its buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HEADS, KV, HEAD = 32, 4, 2, 8


def save(path: Path, *, length_of_cache: bool = False) -> None:
    """Write it; the mask tells the kernel how much is cached, with ``length_of_cache`` a graph that asks the cache."""
    width, narrow = HEADS * HEAD, KV * HEAD
    random = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, width), "q": (width, width), "k": (width, narrow), "v": (width, narrow)}
    shapes["head"] = (width, VOCABULARY)
    weights = [numpy_helper.from_array(random.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    constants = {"one": np.array(1, np.int64), "last": np.array([1], np.int64), "zero": np.array(0, np.int64)}
    weights += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    attention = ["query", "key", "value", "past_key_values.0.key", "past_key_values.0.value", "before", "total"]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "q"], ["query"]),
        helper.make_node("MatMul", ["x", "k"], ["key"]),
        helper.make_node("MatMul", ["x", "v"], ["value"]),
        helper.make_node("ReduceSum", ["attention_mask", "last"], ["seen"], keepdims=0),
        helper.make_node("Sub", ["seen", "one"], ["newest"]),
        helper.make_node("Cast", ["newest"], ["before"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["length"]),
        helper.make_node("Cast", ["length"], ["total"], to=TensorProto.INT32),
        helper.make_node("GroupQueryAttention", attention, ["seen_by", "present.0.key", "present.0.value"],
                         domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV),
        helper.make_node("MatMul", ["seen_by", "head"], ["logits"]),
    ]  # fmt: skip
    if length_of_cache:
        nodes.append(helper.make_node("Shape", ["past_key_values.0.key"], ["asked"]))
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", s]) for n, s in
           (("input_ids", "s"), ("attention_mask", "t"))]  # fmt: skip
    caches = [
        [helper.make_tensor_value_info(f"{name}.0.{part}", TensorProto.FLOAT, ["b", KV, axis, HEAD])
         for part in ("key", "value")] for name, axis in (("past_key_values", "p"), ("present", "t"))
    ]  # fmt: skip
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY])
    graph = helper.make_graph(nodes, "decoder", [*ids, *caches[0]], [logits, *caches[1]], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
