"""Over a hundred bad inputs, one line each: what is asked, the exit code, and a part of the one sentence that says why.

Every one is tried as it is and with ``--json``. Exit code 2 is for usage: options, combinations, what is not there. All
that is wrong with what is there is 1. Nothing is written, and nothing but the sentence is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spinpass
from spinpass import errors
from spinpass.errors import SpinpassError
from spinpass.evaluation import EvalRequest
from spinpass.folders import export
from spinpass.formats import save_program
from spinpass.progress import Silent
from spinpass.quantization import QuantizationConfig
from spinpass.reporting import ReportRequest
from tests.support import folders, programs
from tests.support.commands import document, run

LONGEST = 400
ADVICE = re.compile(
    r"\b(add|ask for|check|choose|compare|copy|export|free|give|leave|merge|name|pip install|remove|save|say|see|"
    r"shorten|take|try|use|write|is not one of|nearest is)\b"
)
TYPES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SpinpassError)}

# places of the table, in braces: files and folders of the fixture below; {out} is where nothing may be written
PATHS = [
    ("plan {tmp}/missing.pt2", 2, "there is no file or folder"),
    ("plan {tmp}/missing.gguf", 2, "there is no file or folder"),
    ("plan ./missing", 2, "there is no file or folder ./missing"),
    ("plan no-such-model", 2, "there is no file or folder no-such-model here, and transformers cannot load"),
    ("plan no-such/model", 2, "there is no file or folder no-such/model here, and transformers cannot load"),
    ("plan {newline}", 2, "there is no file or folder"),
    ("plan {notes}", 2, "is neither a .pt2 nor a .gguf file"),
    ("plan {empty_folder}", 2, "holds no model"),
    ("plan {two_gguf}", 2, "holds several GGUF files; name one of a.gguf, b.gguf"),
    ("plan", 2, "Missing argument 'MODEL'; see spinpass plan --help"),
    ("export {model}", 2, "Missing argument 'OUT'; see spinpass export --help"),
    ("export {tmp}/missing.pt2 {out}", 2, "there is no file or folder"),
    ("export {model} {model}", 2, "is the model that is exported, or lies in it: name another folder"),
    ("export {model} {model}/out", 2, "is the model that is exported, or lies in it: name another folder"),
    ("export {model} {others}", 2, "holds keep.txt, which no export of spinpass has put there"),
    ("export {model} {notes}", 1, "a part of the path is a file, not a folder"),
    ("export {model} {notes}/out", 1, "a part of the path is a file, not a folder"),
    ("rotate {tmp}/missing.pt2 {out}.pt2", 2, "there is no file"),
    ("rotate {empty_folder} {out}.pt2", 2, "there is no file"),
    ("rotate {pt2} {out}.onnx", 2, "does not end in .pt2"),
    ("rotate {pt2} {pt2}", 2, "is the program that is rotated: name another file"),
    ("rotate {pt2} {notes}/x.pt2", 1, "a part of the path is a file, not a folder"),
    ("verify {pt2} {tmp}/missing.onnx", 2, "there is no file"),
    ("verify {pt2} {notes}", 2, "is neither a .pt2 nor an .onnx file"),
    ("verify {notes} {pt2}", 2, "is no .pt2 file: name the program that B is compared with"),
    ("verify {pt2} {empty_folder}", 2, "there is no file"),
    ("verify {empty_folder} {fake}", 2, "holds an ONNX file, to be compared with a program: name a .pt2 file, not"),
    ("verify {empty_folder} {pt2}", 2, "holds no model: neither config.json with weights nor a GGUF file"),
    ("verify {pt2} {pt2} --matrices {notes}", 2, "--matrices is for two models, of which one was rotated by them"),
    ("rotate-checkpoint {empty_folder} {tmp}/o --matrices {tmp}/R.bin", 2, "R.bin: name one with rotation matrices"),
    ("inspect {tmp}/missing", 2, "there is no model at"),
    ("inspect {notes}", 2, "there is no model at"),
    ("inspect {linear} --check", 2, "stands alone, with no spinpass.json to compare hashes with: leave out --check"),
    ("inspect {linear} --with {tmp}/missing", 2, "there is no model at"),
    ("generate {tmp}/missing hello", 2, "there is no model at"),
    ("generate {model} hello", 2, "is a model of transformers"),
    ("report {model} -o {empty_folder}", 2, "is a folder; name a file in it"),
    ("report {model} -o {notes}/page.html", 1, "a part of the path is a file, not a folder"),
    ("report {tmp}/missing.pt2 -o {out}", 2, "there is no file or folder"),
    ("report {fake} -o {out}", 2, "is exported; a report needs the program it was made of"),
    ("tune {tmp}/missing.pt2 --quantize w4-rtn --calibration {text}", 2, "there is no file or folder"),
    ("eval {tmp}/missing.pt2", 2, "there is no file or folder"),
    ("eval {tmp}/missing.onnx", 2, "there is no file"),
    ("eval {model} --against {tmp}/missing.pt2", 2, "there is no file or folder"),
    ("eval {model} --file {tmp}/missing.onnx", 2, "there is no file"),
]
MODELS = [
    ("plan {no_config}", 2, "holds no model: neither config.json with weights nor a GGUF file"),
    ("plan {no_weights}", 2, "holds no model"),
    ("plan {bad_json}", 1, "config.json cannot be read as JSON"),
    ("plan {list_json}", 1, "it holds a list, not an object of JSON"),
    ("plan {unknown_type}", 1, "knows no model type 'quux'"),
    ("plan {encoder}", 1, "was saved as BertModel, which is not exported"),
    ("plan {seq2seq}", 1, "is no causal language model, as exports are: choose one"),
    ("plan {adapter}", 1, "holds an adapter (adapter_config.json)"),
    ("plan {own_code}", 1, "runs modelling code of its own"),
    ("plan {packed}", 2, "holds packed weights (gptq), which are not rotated behind your back: add --dequantize"),
    ("plan {packed_otherwise} --dequantize", 1, "holds packed weights (awq), whose values cannot be taken here"),
    ("plan {torn_weights}", 1, "model.safetensors is damaged: its tensors have"),
    ("plan {bad_gguf}", 1, "is no GGUF file: it does not begin as one"),
    ("plan {bad_pt2}", 1, "is not a .pt2 archive, or it is cut short"),
    ("plan {empty_pt2}", 1, "is not a .pt2 archive, or it is cut short"),
    ("plan {zip_pt2}", 1, "cannot read"),
    ("rotate {bad_pt2} {out}.pt2", 1, "is not a .pt2 archive, or it is cut short"),
    ("verify {linear} {bad_pt2}", 1, "is not a .pt2 archive, or it is cut short"),
    ("verify {linear} {fake}", 1, "ONNX"),
    ("inspect {fake}", 1, "is no ONNX model"),
    ("inspect {bad_manifest}", 1, "cannot be read"),
    ("export {encoder} {out}", 1, "was saved as BertModel"),
    ("export {packed} {out} --int4", 2, "add --dequantize"),
    ("export {torn_weights} {out} --bits 16", 1, "model.safetensors is damaged: its tensors have"),
    ("eval {encoder}", 1, "was saved as BertModel"),
    ("eval {model} --against {encoder}", 1, "was saved as BertModel"),
    ("report {encoder} -o {out}", 1, "was saved as BertModel"),
    ("tune {encoder} --quantize w4-rtn --calibration {text}", 1, "was saved as BertModel"),
    ("generate {bare} hello", 1, "holds no tokenizer"),
    ("generate {fake} what --max-new-tokens 4", 1, "cannot load model.onnx"),
]
TEXTS = [
    ("export {model} {out} --quantize w4 --calibration {tmp}/none.txt", 2, "none.txt is not a readable UTF-8 text (no such"),
    ("export {model} {out} --quantize w4 --calibration {empty_folder}", 2, "is not a readable UTF-8 text (is a directory)"),
    ("export {model} {out} --quantize w4 --calibration {empty}", 2, "holds no text: name another file"),
    ("export {model} {out} --quantize w4 --calibration {blank}", 2, "holds no text: name another file"),
    ("export {model} {out} --quantize w4 --calibration {latin}", 2, "at byte 3): save it as UTF-8"),
    ("export {model} {out} --quantize w4 --calibration {short}", 2, "which has 9: choose a longer text"),
    ("export {model} {out} --quantize w8-rtn-a8 --calibration {text}", 2, "w8-rtn-a8 rounds without a text: leave out --calibration"),
    ("export {model} {out} --quantize w4 --calibration {text} --samples 99", 2, "--samples 99 needs 50,688 tokens"),
    ("export {model} {out} --kv-cache int8 --calibration {short}", 2, "which has 9: choose a longer text"),
    ("export {no_tokenizer} {out} --quantize w4 --calibration {text}", 2, "has no tokenizer to read"),
    ("export {pt2} {out} --quantize w4 --calibration {text}", 2, "has no tokenizer to read"),
    ("export {pt2} {out} --kv-cache int8 --calibration {text}", 2, "has no tokenizer to read"),
    ("tune {model} --quantize w4-rtn --calibration {short}", 2, "the text has 9"),
    ("tune {model} --quantize w4-rtn --text {short}", 2, "the text has 9"),
    ("tune {model} --quantize w4-rtn --calibration {text} --text {text}", 2, "name two of them"),
    ("tune {model} --quantize w4-rtn --calibration {latin}", 2, "save it as UTF-8"),
    ("tune {pt2} --quantize w4-rtn --calibration {text}", 2, "has no tokenizer to read"),
    ("eval {model} --text {empty}", 2, "holds no text: name another file"),
    ("eval {model} --text {short}", 2, "16 windows of 512 tokens need 8,192 tokens; the text has 9"),
    ("eval {model} --text {latin}", 2, "save it as UTF-8"),
    ("eval {model} --quantize w4 --calibration {short} --text {text} --length 40 --windows 2", 2, "the text has 9"),
    ("eval {pt2} --text {text}", 2, "has no tokenizer; name a folder that has one with --tokenizer"),
    ("eval {pt2} --text {text} --tokenizer {empty_folder}", 2, "transformers finds no tokenizer at"),
    ("eval {pt2} --text {text} --tokenizer ./nowhere", 2, "there is no folder ./nowhere here, and transformers finds"),
    ("report {model} -o {out} --text {short}", 2, "8 windows of 256 tokens need 2,048 tokens; the text has 9"),
    ("report {model} -o {out} --text {empty}", 2, "holds no text: name another file"),
    ("report {model} -o {out} --scheme w4 --calibration {latin}", 2, "save it as UTF-8"),
    ("report {pt2} -o {out}", 2, "has no tokenizer; name a folder that has one with --tokenizer"),
    ("generate {fake} ''", 2, "the prompt has no tokens to start from"),
    ("generate {fake} what --max-new-tokens 999", 2, "more than the 64 positions"),
    ("chat {no_template}", 2, "has no chat template: use spinpass generate"),
    ("chat {out}", 2, "there is no model at"),
    ("chat {fake} --threads 0", 2, "--threads 0: choose 1 or more"),
]
VALUES = [
    ("plan {pt2} --dtype int3", 2, "'int3' is not one of"),
    ("plan {pt2} --rotations R1,R7", 2, "unknown rotation 'R7'; choose from R1"),
    ("plan {pt2} --rotations ,", 2, "unknown rotation ''"),
    ("plan {pt2} --rotations none", 2, "a plan needs a rotation; choose from R1"),
    ("rotate {pt2} {out}.pt2 --rotations none", 2, "rotate needs a rotation; choose from R1"),
    ("report {model} -o {out} --rotations none", 2, "a report needs a rotation; choose from R1"),
    ("plan {pt2} --kind fourier", 2, "for '--kind': 'fourier' is not one of"),
    ("plan {pt2} --form inline", 2, "'inline' is not one of"),
    ("plan {pt2} --tied maybe", 2, "'maybe' is not one of"),
    ("plan {pt2} --cache lost", 2, "'lost' is not one of"),
    ("plan {pt2} --block-size 0", 2, "block_size=0 is not a positive integer"),
    ("plan {pt2} --block-size x", 2, "Invalid value for '--block-size'"),
    ("plan {pt2} --seed 1.5", 2, "Invalid value for '--seed'"),
    ("plan {pt2} --exclude R4:nothing", 2, "exclude has 'R4:nothing', which is no space and no parameter of this program; the nearest is 'R4:model.layers."),
    ("plan {pt2} --rotatons R1", 2, "there is no option --rotatons; did you mean --rotations? see spinpass plan --help"),
    ("exprot {model} {out}", 2, "there is no command exprot; did you mean export? see spinpass --help"),
    ("export {model} {out} --to tflite", 2, "'tflite' is not one of"),
    ("export {model} {out} --kv-cache int2 --calibration {text}", 2, "'int2' is not one of"),
    ("export {model} {out} --quantize w5", 2, "weights of 5 bits: choose one of 2, 3, 4, 8"),
    ("export {model} {out} --quantize w4g48-rtn", 2, "group_size 48 is not one of 16, 32, 64, 128, 256"),
    ("export {model} {out} --quantize a6", 2, "activations of 6 bits: choose 4 or 8"),
    ("export {model} {out} --quantize kv2", 2, "KV cache of 2 bits: choose 4 or 8"),
    ("export {model} {out} --quantize w4-nf4", 2, "'nf4' in 'w4-nf4' is not a part of a scheme such as"),
    ("export {model} {out} --quantize w4-w8-rtn", 2, "both say the width of the weights: leave one of them out"),
    ("export {model} {out} --quantize w4-rtn-gptq", 2, "both say how weights are rounded: leave one of them out"),
    ("export {model} {out} --quantize rtn-a8", 2, "add a width such as w4"),
    ("export {model} {out} --quantize w4-rtn-order", 2, "'order' in 'w4-rtn-order' is GPTQ's"),
    ("export {model} {out} --quantize w9.5-rtn --calibration {text}", 2, "9.5 bits on average: choose a number from 2 to 8"),
    ("export {model} {out} --quantize w4 --calibration {text} --samples 0", 2, "0 windows to calibrate on: choose 1 or more"),
    ("tune {model} --quantize a5 --calibration {text}", 2, "activations of 5 bits"),
    ("tune {model} --quantize a8 --calibration {text} --block-sizes 4,x", 2, "--block-sizes '4,x' is not a list of numbers"),
    ("tune {model} --quantize a8 --calibration {text} --block-sizes -4", 2, "block_size=-4 is not a positive integer"),
    ("tune {model} --quantize a8 --calibration {text} --windows 1", 2, "1 windows to decide on: choose 2 or more"),
    ("tune {model} --quantize a8 --calibration {text} --length 1", 2, "windows of 1 tokens"),
    ("eval {model} --windows 0", 2, "0 windows to score on: choose 1 or more"),
    ("eval {model} --length 1", 2, "windows of 1 tokens"),
    ("eval {model} --rotate sideways", 2, "'sideways' is not one of"),
    ("report {model} -o {out} --scheme w4 --scheme w4", 2, "the scheme w4 is named twice"),
    ("report {model} -o {out} --windows 0", 2, "at least one window of two tokens"),
    ("generate {fake} what --temperature -1", 2, "temperature -1.0 is negative"),
    ("generate {fake} what --temperature 1 --top-p 0", 2, "top_p 0.0 is not in (0, 1]"),
    ("generate {fake} what --max-new-tokens 0", 2, "--max-new-tokens 0: choose 1 or more"),
    ("generate {fake} what --threads 0", 2, "--threads 0: choose 1 or more"),
    ("generate {fake} what --provider NoSuchProvider --max-new-tokens 4", 2, "has no provider 'NoSuchProvider' here; choose"),
]
COMBINATIONS = [
    ("export {model} {out} --int4 --calibration {text}", 2, "--int4 rounds to nearest, without a text: leave out --calibration"),
    ("export {model} {out} --bits 16 --calibration {text}", 2, "nothing is quantized: leave out --calibration"),
    ("export {model} {out} --int4 --samples 4", 2, "--samples 4 are windows of a text to calibrate on: add --calibration"),
    ("export {model} {out} --int4 --quantize w4-rtn", 2, "--int4 rounds the weights by itself: leave it out"),
    ("export {model} {out} --context 64", 2, "--context is the size of a cache inside an ExecuTorch program: leave it out"),
    ("export {model} {out} --kv-cache int8 --calibration {text} --no-fuse", 2, "leave out --no-fuse and --no-cache"),
    ("export {model} {out} --kv-cache int8 --calibration {text} --quantize w4-rtn-kv4", 2, "leave one of them out"),
    ("export {model} {out} --kv-cache int8 --calibration {text} --dtype bfloat16", 2, "in float32: leave out --dtype bfloat16"),
    ("export {model} {out} --int4 --dtype bfloat16", 2, "no kernel for integer weights beside bfloat16"),
    ("export {half} {out} --quantize w4-rtn --dtype auto", 2, "no kernel for integer weights beside bfloat16"),
    ("export {half} {out} --kv-cache int8 --calibration {text} --dtype auto", 2, "in float32: leave out --dtype auto"),
    ("export {odd} {out} --kv-cache int8 --calibration {text}", 1, "its heads are of size 12, and GroupQueryAttention takes"),
    ("export {model} {out} --to executorch --int4", 2, "--int4 packs for ONNX Runtime"),
    ("export {model} {out} --to executorch --no-cache", 2, "leave --no-cache out"),
    ("export {model} {out} --to executorch --no-fuse", 2, "--no-fuse is for ONNX: leave it out with --to executorch"),
    ("export {model} {out} --to executorch --kv-cache int8 --calibration {text}", 2, "--kv-cache is ONNX Runtime's"),
    ("export {model} {out} --to openvino --int4", 2, "--int4 packs for ONNX Runtime: use --bits 4 with --to openvino"),
    ("export {model} {out} --to openvino --kv-cache int8", 2, "--kv-cache is ONNX Runtime's: leave it out with --to openvino"),
    ("export {model} {out} --to openvino --no-fuse", 2, "--no-fuse is for ONNX: leave it out with --to openvino"),
    ("export {model} {out} --to openvino --context 64", 2, "--context is the size of a cache inside an ExecuTorch program"),
    ("export {model} {out} --to openvino --quantize w4-rtn-a8", 2, "leave the parts a… and kv… out of --quantize w4-rtn-a8"),
    ("export {model} {out} --to openvino --quantize w4-rtn-kv4", 2, "rounds activations and caches by itself, as it runs"),
    ("export {model} {out} --to openvino --bits 16 --dtype bfloat16", 2, "OpenVINO's Python interface has no bfloat16"),
    ("export {model} {out} --to openvino --bits 4 --dtype float16", 2, "multiplies by integers in float32: leave out --dtype float16"),
    ("export {model} {out} --to gptq --bits 16", 2, "--to gptq writes quantized weights: add --quantize"),
    ("export {model} {out} --to gptq --quantize w4-rtn --no-fuse", 2, "--no-fuse is for ONNX: leave it out with --to gptq"),
    ("export {model} {out} --to gptq --quantize w4-rtn --no-cache", 2, "leave out --no-cache with --to gptq"),
    ("export {model} {out} --to gptq --quantize w4-rtn --last-logits", 2, "leave out --last-logits and --all-logits with --to gptq"),
    ("export {model} {out} --to gptq --quantize w4-rtn-a8", 2, "a GPTQ checkpoint holds weights alone"),
    ("export {model} {out} --to gptq --quantize w4-rtn --context 9", 2, "leave it out with --to gptq"),
    ("export {model} {out} --to gptq --quantize w4-rtn", 2, "know no online rotation"),
    ("export {model} {out} --rotations none --form online", 2, "--rotations none rotates nothing: leave out --form"),
    ("export {model} {out} --rotations none --seed 3 --exclude R1:*", 2, "leave out --seed, --exclude"),
    ("export {model} {out} --seed 3", 2, "seed=3 changes nothing: kind='hadamard' draws nothing"),
    ("export {model} {out} --rotations R2 --form online", 2, "form='online' is of R1, and R1 is not among the rotations (R2)"),
    ("export {model} {out} --rotations R2,R4 --tied untie", 2, "tied='untie' is of R1"),
    ("export {pt2} {out} --dtype bfloat16", 2, "is a program, which is taken as it is: leave out --dtype"),
    ("export {pt2} {out} --no-cache --dequantize", 2, "is a program, which is taken as it is: leave out --no-cache, --dequantize"),
    ("plan {pt2} --trust-remote-code", 2, "is a program, which is taken as it is: leave out --trust-remote-code"),
    ("plan {pt2} --dtype float16", 2, "is a program, which is taken as it is: leave out --dtype"),
    ("tune {model} --quantize a8 --calibration {text} --force", 2, "--force is about the folder that is written: add --out"),
    ("tune {model} --quantize w4-rtn --calibration {text} --out {model}", 2, "is the model that is exported, or lies in it"),
    ("eval {model} --calibration {text}", 2, "nothing is quantized: leave out --calibration"),
    ("eval {model} --quantize w8-rtn --calibration {text}", 2, "w8-rtn calibrates nothing: leave out --calibration"),
    ("eval {model} --samples 3", 2, "--samples 3 are windows of a text to calibrate on"),
    ("eval {model} --against {model} --rotate online", 2, "--against compares two models as they are: leave out"),
    ("eval {model} --against {model} --file {fake}", 2, "--file is compared with MODEL: leave out --against"),
    ("eval {model} --text {text} --dataset x", 2, "leave out one of them"),
    ("eval {fake} --quantize w4-rtn", 2, "is exported; --quantize and --rotate need the program"),
    ("eval {fake} --dequantize", 2, "is taken as it is: leave out --dequantize"),
    ("eval {pt2} --trust-remote-code --tokenizer {model}", 2, "is taken as it is: leave out --trust-remote-code"),
    ("report {model} -o {out} --calibration {text}", 2, "nothing is quantized: leave out --calibration"),
    ("report {pt2} -o {out} --tokenizer {model} --dequantize", 2, "is taken as it is: leave out --dequantize"),
    ("report {model} -o {out} --rotations R4 --form offline", 2, "form='offline' is of R1"),
    ("generate {fake} what --seed 3", 2, "--seed 3 is of draws, and temperature 0 draws nothing"),
    ("generate {fake} what --top-k 5", 2, "top_k 5 is of draws, and temperature 0 draws nothing"),
    ("generate {fake} what --top-p 0.5", 2, "top_p 0.5 is of draws, and temperature 0 draws nothing"),
]
ROWS = [*PATHS, *MODELS, *TEXTS, *VALUES, *COMBINATIONS]


def rewritten(source: Path, target: Path, **entries: Any) -> Path:
    """A copy of a model folder with other entries in its config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    found = {"model": folders.model_folder(root / "model", "llama"), "tmp": root / "nothing"}
    model = found["model"]
    found["odd"] = folders.model_folder(root / "odd", "llama_tied")
    found["half"] = rewritten(model, root / "half", dtype="bfloat16")

    def folder(name: str, **files: str | bytes) -> Path:
        (root / name).mkdir()
        for file, content in files.items():
            path = root / name / file.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found[name] = root / name
        return root / name

    weights = (model / "model.safetensors").read_bytes()
    config = json.loads((model / "config.json").read_text())
    folder("empty_folder")
    folder("others", keep__txt="kept")
    folder("two_gguf", a__gguf="", b__gguf="")
    folder("no_config", model__safetensors=weights)
    folder("no_weights", config__json=json.dumps(config))
    folder("bad_json", model__safetensors=weights, config__json="{")
    folder("list_json", model__safetensors=weights, config__json="[1]")
    folder("torn_weights", model__safetensors=weights[:5000], config__json=json.dumps(config))
    folder("no_tokenizer", model__safetensors=weights, config__json=json.dumps(config))
    folder("bare", model__onnx="no model", config__json=json.dumps(config))
    for name, entries in {
        "unknown_type": {"model_type": "quux", "architectures": ["QuuxForCausalLM"]},
        "encoder": {"model_type": "bert", "architectures": ["BertModel"]},
        "seq2seq": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "own_code": {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        "packed": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        "packed_otherwise": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    }.items():
        found[name] = rewritten(model, root / name, **entries)
    found["adapter"] = rewritten(model, root / "adapter")
    (found["adapter"] / "adapter_config.json").write_text("{}")
    for name in ("fake", "no_template", "bad_manifest"):
        found[name] = rewritten(model, root / name)
        (found[name] / "model.onnx").write_text("no model")
    for file in ("chat_template.jinja", "model.safetensors"):
        (found["no_template"] / file).unlink(missing_ok=True)
    settings = found["no_template"] / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    (found["bad_manifest"] / "spinpass.json").write_text("{")

    def file(name: str, content: str | bytes, suffix: str = ".txt") -> None:
        found[name] = root / f"{name}{suffix}"
        found[name].write_bytes(content if isinstance(content, bytes) else content.encode())

    file("notes", "hello")
    file("empty", "")
    file("blank", " \n\n")
    file("short", "what is the weather like if it is on")
    file("text", "what is the weather like if it is on and not in a " * 400)
    file("latin", "caf\xe9 au lait".encode("latin-1"))
    file("bad_pt2", "no archive", ".pt2")
    file("empty_pt2", "", ".pt2")
    file("bad_gguf", "no gguf", ".gguf")
    file("zip_pt2", b"PK\x05\x06" + bytes(18), ".pt2")
    save_program(programs.program("llama_tied", "hf", torch.float32), root / "program.pt2")
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    save_program(torch.export.export(linear, (torch.zeros(1, 4),)), root / "linear.pt2")
    found["linear"] = root / "linear.pt2"
    return found | {"pt2": root / "program.pt2", "newline": root / "two\nlines"}


def split(line: str, places: dict[str, Path]) -> list[str]:
    """The arguments of a line of the table; two quotes stand for one that is empty."""
    return ["" if part == "''" else part.format(**places) for part in line.split(" ")]


def check_sentence(message: str, why: str) -> None:
    assert why in message, message
    assert len(message) <= LONGEST, f"{len(message)} characters: {message}"
    assert ADVICE.search(message), f"it does not say what to do: {message}"
    assert "\n" not in message and "Traceback" not in message and "unexpected " not in message, message


def loaded(*_: object, **__: object) -> None:
    raise AssertionError("a model is loaded")


def test_the_table_is_long_and_says_nothing_twice() -> None:
    asked = [line for line, _, _ in ROWS]
    assert len(asked) == len(set(asked)) >= 100 and {code for _, code, _ in ROWS} == {1, 2}


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_one_sentence_and_the_right_code(
    number: int, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, code, why = ROWS[number]
    monkeypatch.chdir(tmp_path)
    if ROWS[number] in (*TEXTS, *COMBINATIONS):  # said before a model is loaded
        for place in ("folders.making", "cli.tune", "evaluation.scoring"):
            monkeypatch.setattr(f"spinpass.{place}.load_model", loaded)
    before = {path: path.stat().st_mtime_ns for path in places["model"].parent.rglob("*")}
    arguments = split(line, places | {"out": tmp_path / "out"})
    result = run(*arguments)
    steps = re.compile(r"\s*\d+ s  ")  # of a machine so slow that there is progress to tell
    said = [text for text in result.stderr.splitlines() if text.strip() and not steps.match(text)]
    assert result.exit_code == code and len(said) == 1 and result.stdout == "", (line, result.exit_code, result.stderr)
    assert said[0].startswith("spinpass: "), said
    check_sentence(said[0].removeprefix("spinpass: "), why)
    told = document(run(*arguments, "--json"))
    assert told["ok"] is False and told["message"] == said[0].removeprefix("spinpass: ")
    assert told["error"] in TYPES | {"UsageError"}, told
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert {path: path.stat().st_mtime_ns for path in places["model"].parent.rglob("*")} == before


Call = Callable[[dict[str, Path]], object]
CALLS: dict[str, tuple[Call, str]] = {
    "export to nothing known": (lambda p: export(p["model"], p["out"], to="tflite"), "to='tflite' is not one of"),  # type: ignore[arg-type]
    "export of an unknown cache": (lambda p: export(p["model"], p["out"], kv_cache="int2", calibration=p["text"]), "kv_cache='int2' is not one of"),  # type: ignore[arg-type]
    "export in an unknown dtype": (lambda p: export(p["model"], p["out"], dtype="int3"), "dtype='int3' is not one of"),
    "export with no configuration": (lambda p: export(p["model"], p["out"], "R1"), "give a spinpass.RotationConfig or None"),  # type: ignore[arg-type]
    "export certified and not": (lambda p: export(p["model"], p["out"], spinpass.RotationConfig(verify=False)), "disagree: leave one out"),
    "export with a context": (lambda p: export(p["model"], p["out"], context=64), "leave it out with --to onnx"),
    "export with an idle text": (lambda p: export(p["model"], p["out"], int4=True, calibration=p["text"]), "leave out --calibration"),
    "export with idle windows": (lambda p: export(p["model"], p["out"], bits=16, calibration_windows=4), "nothing here reads a text: leave it out"),
    "export of a program in a dtype": (lambda p: export(p["pt2"], p["out"], dtype="float16"), "leave out --dtype"),
    "eval of too few windows": (lambda p: EvalRequest(str(p["model"]), windows=0), "choose 1 or more"),
    "eval with an idle text": (lambda p: EvalRequest(str(p["model"]), calibration=p["text"]), "leave out --calibration"),
    "eval without a tokenizer": (lambda p: EvalRequest(str(p["pt2"])).run(Silent()), "with --tokenizer"),
    "report with an idle text": (lambda p: ReportRequest("m", calibration=p["text"]), "leave out --calibration"),
    "a plan of a program that is none": (lambda p: spinpass.plan("model.pt2"), "ExportedProgram"),  # type: ignore[arg-type]
    "a scheme said twice": (lambda p: QuantizationConfig.parse("w4-w4"), "leave one of them out"),
    "an idle seed": (lambda p: spinpass.RotationConfig(seed=3), "leave the seed out"),
    "an idle form": (lambda p: spinpass.RotationConfig(rotations="R2", form="online"), "leave form out"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_from_python_too(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    call, why = CALLS[name]
    with pytest.raises(SpinpassError) as found:
        call(places | {"out": tmp_path / "out"})
    check_sentence(str(found.value), why)
    assert not list(tmp_path.iterdir())
