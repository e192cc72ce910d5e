"""A rotated program as an ONNX file: stock ONNX Runtime runs it, and online Hadamards stay recognisable in the file."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from decoder import VOCABULARY, export_decoder

import spinpass
from spinpass.exporters import onnx

program = export_decoder()
rotated = spinpass.transform(program)

with tempfile.TemporaryDirectory() as folder:
    report = onnx.export(rotated, Path(folder, "decoder.onnx"), output_names=["logits"])
    print(f"{report.path.name}: {report.bytes / 1e3:.0f} kB, {report.hadamards} online Hadamards")
    print(report.certificate.verdict if report.certificate else report.uncertified)

    session = onnxruntime.InferenceSession(str(report.path))
    ids = torch.randint(VOCABULARY, (1, 12))
    (logits,) = session.run(["logits"], {report.inputs[0]: ids.numpy()})
    difference = (torch.from_numpy(logits) - program.module()(ids)).abs().max()
    print(f"ONNX Runtime on the rotated file, PyTorch on the original: max |difference| {difference:.1e}")
