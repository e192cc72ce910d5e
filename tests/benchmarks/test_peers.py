"""The table of other tools: what is read off their files, what becomes of their errors, and which files are best."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.peers import makers, rows
from benchmarks.peers.__main__ import chosen, draw_picture, interpreters, tables, there
from benchmarks.peers.environments import Cost, Environments, PeerError, last_words, run
from benchmarks.peers.makers import Made, Workshop, settled
from benchmarks.peers.rows import Bench
from benchmarks.peers.source import Source
from benchmarks.peers.stored import counted, of_gguf, of_onnx, stored
from benchmarks.pictures.pareto import front
from spinpass.progress import Silent


def graph_file(path: Path, nodes: list[Any], shapes: dict[str, tuple[int, list[int]]], outputs: Sequence[Any] = ()) -> Path:
    """A file whose initializers have these types and shapes; nothing runs it."""
    held = []
    for name, (kind, dims) in shapes.items():
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="absent.data")
        held.append(tensor)
    graph = helper.make_graph(nodes, "g", list(outputs), list(outputs), held)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph), path)
    return path


def products(bits: int, block: int, count: int) -> list[Any]:
    about: dict[str, Any] = dict(domain="com.microsoft", bits=bits, block_size=block)
    return [helper.make_node("MatMulNBits", ["x", f"codes{bits}", f"scales{bits}", ""], [f"y{bits}{k}"], **about) for k in range(count)]


def test_products_and_tables_are_counted_by_bits_and_block(tmp_path: Path) -> None:
    table = helper.make_node("GatherBlockQuantized", ["codes8", "ids", "scales8"], ["t"], domain="com.microsoft", bits=8, block_size=32)
    shapes = {
        "codes4": (TensorProto.UINT8, [960, 18, 16]), "scales4": (TensorProto.FLOAT, [960, 1800]),
        "codes8": (TensorProto.UINT8, [960, 18, 32]), "scales8": (TensorProto.FLOAT, [960, 1800]),
    }  # fmt: skip
    path = graph_file(tmp_path / "model.onnx", [*products(4, 32, 3), *products(8, 32, 1), table], shapes)
    assert of_onnx(path) == "3×4 bits/32, 1×8 bits/32; table 1×8 bits/32"
    assert stored(tmp_path) == of_onnx(path)


def test_integers_of_channels_and_what_is_left_in_floats_are_said(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "zx", "zw"], ["a"]),
        helper.make_node("MatMul", ["a", "head"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["scores"]),  # computed operands are no weights
        helper.make_node("Gather", ["table", "ids"], ["c"]),
    ]
    shapes = {"w": (TensorProto.INT8, [64, 64]), "head": (TensorProto.FLOAT16, [1000, 500]), "table": (TensorProto.FLOAT, [2000, 1000])}
    path = graph_file(tmp_path / "model.onnx", nodes, shapes)
    assert of_onnx(path) == "1×8 bits/channel, 1×float16; floats 2.0M float32, 0.5M float16"


def test_scales_are_no_weights_in_floats(tmp_path: Path) -> None:
    shapes = {"codes4": (TensorProto.UINT8, [9, 9]), "scales4": (TensorProto.FLOAT, [1000, 1000])}
    assert of_onnx(graph_file(tmp_path / "m.onnx", products(4, 16, 2), shapes)) == "2×4 bits/16"


def test_the_types_of_a_gguf_file_are_counted(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    for name in ("a", "b"):
        writer.add_tensor(name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert of_gguf(tmp_path / "m.gguf") == stored(tmp_path / "m.gguf") == "2×Q8_0, 1×F32"


def test_the_most_frequent_kind_comes_first() -> None:
    assert counted({"a": 1, "b": 3}) == "3×b, 1×a" and counted({}) == ""


def test_the_open_size_of_a_head_is_written_down_and_the_length_stays_open(tmp_path: Path) -> None:
    cache = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 3, "past", "kv_cache_dim"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    graph_file(tmp_path / "model.onnx", [], {}, [ids, cache])
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"head_size": 64}}}))
    for _ in range(2):  # once is enough
        shapes = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(settled(tmp_path) / "model.onnx").graph.input]
        assert shapes == [["batch", "length"], ["batch", 3, "past", 64]]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Traceback\n  File x\nValueError: group 128 does not divide 576\nbye\n", "ValueError: group 128 does not divide 576"),
        ("10%\r50%\rtorch.cuda.OutOfMemoryError: none left\r", "torch.cuda.OutOfMemoryError: none left"),
        ("loading\nKilled\n\n", "Killed"),
        ("", ""),
        ("KeyError: " + "x" * 500, "KeyError: " + "x" * 189 + "…"),
    ],
)
def test_the_last_exception_of_a_log_is_what_is_said(log: str, words: str) -> None:
    assert last_words(log) == words


def test_a_command_that_fails_says_why_and_one_that_works_what_it_took(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="^RuntimeError: no kernel$"):
        run([sys.executable, "-c", "raise RuntimeError('no kernel')"], tmp_path / "log.txt")
    with pytest.raises(PeerError, match="exit code 3, and nothing was said"):
        run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log.txt")
    with pytest.raises(PeerError, match="^ended by SIGKILL, having said: begun$"):
        run([sys.executable, "-c", "import os; print('begun', flush=True); os.kill(os.getpid(), 9)"], tmp_path / "log.txt")
    with pytest.raises(PeerError, match="cannot be started: No such file"):
        run([str(tmp_path / "absent")], tmp_path / "log.txt")
    cost = run([sys.executable, "-c", "print('done')"], tmp_path / "log.txt")
    assert cost.peak_bytes > 1e6 and 0 < cost.cpu_minutes < 1 and (tmp_path / "log.txt").read_text() == "done\n"


class Fixed:
    """Two tokens, of which the second is as likely as a logit says."""

    def __init__(self, logit: float) -> None:
        self.logit = logit

    def logits(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([[0.0, self.logit]]).repeat(len(ids), 1)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A tool without an environment, whose file is two bytes long and always right."""
    (tmp_path / "m.gguf").write_bytes(b"weights")
    source = Source(tmp_path / "m.gguf", tmp_path, tmp_path / "text", tmp_path / "windows")
    source.__dict__["weights"] = 4

    def tool(way: str, folder: Path, shop: Workshop) -> Made:
        if way == "broken":
            raise PeerError("it has no kernel")
        if way == "ends":
            raise SystemExit("the process ended")
        made.append(way)
        (folder / "model.onnx").write_bytes(b"42")
        return Made(folder, note=way)

    made: list[str] = []
    monkeypatch.setattr(makers, "MAKERS", {"spinpass": tool})
    monkeypatch.setattr(rows, "scorer", lambda path, shop: Fixed(1.0))
    monkeypatch.setattr(rows, "stored", lambda path: "1×4 bits/32")
    found = Bench(Workshop(source, Environments(tmp_path, {})), Fixed(1.0), {"text": [[0, 1, 1], [1, 0, 1]]}, tmp_path / "rows")
    found.__dict__["made"] = made
    return found


def test_a_row_has_sizes_ratios_and_what_was_asked_for(bench: Bench) -> None:
    row = bench.row("spinpass:good", Silent())
    assert (row["bytes"], row["bits_per_weight"], row["stored"], row["asked"]) == (2, 4.0, "1×4 bits/32", "good")
    assert row["ratios"] == {"text": 1.0} and row["errors"] == {"text": 0.0} and row["kl"] == 0 and row["agreement"] == 1
    assert row["mean"] == 1 and row["cpu_minutes"] is None and row["versions"] == {}


def test_a_row_is_kept_until_something_that_it_depends_on_changes(bench: Bench) -> None:
    made = bench.__dict__["made"]
    first = bench.row("spinpass:good", Silent())
    assert bench.row("spinpass:good", Silent()) == first and made == ["good"]
    other = Bench(bench.shop, bench.float, {"text": [[0, 1, 0], [1, 0, 1]]}, bench.folder)
    assert other.row("spinpass:good", Silent())["key"] != first["key"] and made == ["good", "good"]
    again = Bench(bench.shop, bench.float, other.cut, bench.folder, again=True)
    again.row("spinpass:good", Silent())
    assert len(made) == 3


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("spinpass:broken", "it has no kernel"),
        ("spinpass:ends", "the process ended"),
        ("nobody:way", "there is no tool 'nobody': genai, olive, autoround, llama are known"),
    ],
)
def test_what_does_not_run_is_a_row_with_its_error(bench: Bench, name: str, error: str) -> None:
    row = bench.row(name, Silent())
    assert row.keys() == {"row", "error"} and error in row["error"]
    assert "error" not in bench.row("spinpass:good", Silent())


def test_a_file_that_is_there_is_not_made(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"12345")
    named = there([f"spinpass:good={tmp_path}"])
    row = Bench(bench.shop, bench.float, bench.cut, bench.folder, files=named).row("spinpass:good", Silent())
    assert row["bytes"] == 5 and row["path"] == str(tmp_path) and not bench.__dict__["made"]
    assert bench.row("spinpass:good", Silent())["bytes"] == 2
    for wrong in ("spinpass:good", f"spinpass:good={tmp_path / 'absent'}"):
        with pytest.raises(typer.BadParameter, match="is not TOOL:WAY=PATH of a file that is there"):
            there([wrong])


def test_texts_are_chosen_by_name() -> None:
    texts = {"help": "a", "code": "b"}
    assert chosen(texts, "") == texts and list(chosen(texts, "code, help")) == ["code", "help"]
    with pytest.raises(typer.BadParameter, match="there is no text 'prose': help, code are"):
        chosen(texts, "code,prose")


def test_an_interpreter_is_named_by_its_tool() -> None:
    assert interpreters(["genai=a/python", "llama=b=c"]) == {"genai": "a/python", "llama": "b=c"}
    for wrong in ("genai", "genai=", "nobody=python"):
        with pytest.raises(typer.BadParameter, match="is not TOOL=PYTHON with one of genai, olive, autoround, llama"):
            interpreters([wrong])


@pytest.mark.parametrize(("way", "found"), [("gptq/32", (32, [])), ("gptq/128/head8", (128, ["algo_config=rtn_last"]))])
def test_a_group_and_a_head_are_read_off_a_way(way: str, found: tuple[int, list[str]]) -> None:
    assert makers._grouped(way, "gptq") == found


@pytest.mark.parametrize("way", ["", "gptq", "gptq/", "gptq/x", "w4/32", "gptq/32/head4", "gptq/32/head8/more"])
def test_a_way_that_there_is_not_is_said(way: str) -> None:
    with pytest.raises(PeerError, match="there is no way .* gptq/GROUP and gptq/GROUP/head8 are known"):
        makers._grouped(way, "gptq")


def test_what_olive_reads_names_no_hub(tmp_path: Path) -> None:
    source = Source(tmp_path / "m.gguf", tmp_path / "folder", tmp_path / "text", tmp_path / "windows")
    config = makers.olive_config(source, 32, tmp_path)
    assert config["passes"]["quantize"]["group_size"] == 32
    assert config["input_model"]["model_path"] == str(source.folder)
    assert config["data_configs"][0]["load_dataset_config"]["data_files"] == [str(source.text)]


def test_what_a_tool_saved_is_found(tmp_path: Path) -> None:
    for name in ("a/cache/config.json", "b/model/config.json", "b/model/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert makers._saved(tmp_path) == tmp_path / "b" / "model"
    with pytest.raises(PeerError, match="the tool ended well and saved no model"):
        makers._saved(tmp_path / "a")
    assert Cost(1.0, 3) + Cost(2.0, 2) == Cost(3.0, 3)


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_file_beats_in_both() -> None:
    points = {"small": (1.0, 9.0), "middle": (2.0, 4.0), "worse": (2.5, 4.0), "beaten": (3.0, 5.0), "large": (4.0, 1.0)}
    assert front(points) == ["small", "middle", "large"]
    assert front({}) == [] and front({"only": (1.0, 1.0)}) == ["only"]
    assert front({"b": (1.0, 2.0), "a": (1.0, 1.0)}) == ["a"]


def document(bench: Bench) -> dict[str, Any]:
    found = [bench.row(name, Silent()) for name in ("spinpass:float", "spinpass:4", "spinpass:broken")]
    timing = {"prompt": 256, "new": 32, "repeats": 5}
    return {"spread": 0.8, "windows": 2, "length": 3, "weights": 4, "timing": timing, "rows": found}


def test_the_picture_is_the_same_for_the_same_rows(bench: Bench, tmp_path: Path) -> None:
    found = document(bench)
    drawn = []
    for name in ("a.svg", "b.svg"):
        draw_picture(found, tmp_path / "new" / name)
        drawn.append((tmp_path / "new" / name).read_text())
    assert drawn[0] == drawn[1] and drawn[0].count("<svg") == 1 and drawn[0].count("<circle") == 2  # a point, and the legend's
    draw_picture(found | {"rows": []}, tmp_path / "none.svg")
    assert (tmp_path / "none.svg").is_file()


def test_the_tables_show_every_row(bench: Bench) -> None:
    worth, inside = tables(document(bench))
    assert worth.row_count == inside.row_count == 3
    assert list(inside.columns[1].cells)[2] == "does not run here: it has no kernel"
    assert list(worth.columns[3].cells)[:2] == ["1.0000 ± 0.0000"] * 2
