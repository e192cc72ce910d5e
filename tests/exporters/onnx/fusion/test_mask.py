"""Masks are run on sizes: which of them have to be known."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir

from spinpass.exporters.onnx.fusion.mask import Mask, read_mask

# A causal mask whose rows are counted at a cache of a length of its own, as layers with a window have it.
MADE = """<ir_version: 10, opset_import: ["": 20]>
mask (int64[b, s] ids, float[b, 2, p, 4] past, float[b, 2, other, 4] another) => (float[b, 1, s, t] bias)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] single = {1}, float nothing = {0}, float closed = {-1000000000}>
{
    ROWS
    new = Shape <start = 1, end = 2> (ids)
    old = Shape <start = 2, end = 3> (past)
    all = Add (old, new)
    begin = Squeeze (old)
    end = Squeeze (all)
    queries = Range (begin, end, one)
    keys = Range (zero, end, one)
    column = Unsqueeze (queries, single)
    later = Greater (keys, column)
    scores = Where (later, closed, nothing)
    sizes = Concat <axis = 0> (rows, single, new, all)
    bias = Expand (scores, sizes)
}"""


def read(rows: str) -> Mask | str:
    model = ir.from_proto(onnx.parser.parse_model(MADE.replace("ROWS", rows)))
    return read_mask(model.graph.outputs[0], model.graph, dict(model.opset_imports), "s", "p", "b")


@pytest.mark.parametrize("axes", ["start = 0, end = 1", "end = 1", "start = -4, end = -3"])
def test_only_sizes_that_are_read_have_to_be_known(axes: str) -> None:
    assert read(f"rows = Shape <{axes}> (another)") == Mask(None, needed=False)


@pytest.mark.parametrize(
    "rows",
    [
        "shape = Shape (another)  rows = Gather (shape, first)",  # where it is read of all
        "far = Shape <start = 2, end = 3> (another)  rows = Sub (far, far)",
        "heads = ReduceSum <keepdims = 0> (another)  rows = Shape (heads)",  # its values are read
    ],
)
def test_a_size_that_is_read_and_not_known_is_the_reason(rows: str) -> None:
    assert read(rows) == "its mask cannot be evaluated: the size other of an input is not known"
