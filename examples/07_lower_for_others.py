"""A rotated program for those who have no spinpass: torch's own operators alone; AOTInductor compiles it if asked."""

import importlib
import sys

import torch
from decoder import VOCABULARY, export_decoder

import spinpass


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """The namespaces of the operators that the program calls."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return sorted({target.namespace for target in targets if hasattr(target, "namespace")})


rotated = spinpass.transform(export_decoder())
lowered = spinpass.lower(rotated)
print(f"operators of {', '.join(operators(rotated))} have become operators of {', '.join(operators(lowered))}")

ids = torch.randint(VOCABULARY, (2, 12))
difference = (lowered.module()(ids) - rotated.module()(ids)).abs().max()
print(f"max |difference of the logits| in float32: {difference:.1e}")

if "--package" in sys.argv:  # takes a C++ compiler and a minute; aoti_load_package of the same module runs it anywhere
    inductor = importlib.import_module("torch._inductor")
    print(inductor.aoti_compile_and_package(lowered, package_path="decoder.pt2"))
