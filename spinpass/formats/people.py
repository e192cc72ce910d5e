"""Files of a folder that are for people, who may edit them: a model card, a licence. No program reads them."""

from __future__ import annotations

import re

README = "README.md"
_TEXTS = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([-._]\w[\w.-]*)?", re.I)
_OTHERS = (".py", ".json", ".bin", ".safetensors", ".onnx", ".pte", ".data", ".html", ".pdf")


def is_for_people(name: str) -> bool:
    """Say whether a file of this name is the model card, or a text that goes with every copy of a model."""
    return name == README or (_TEXTS.fullmatch(name) is not None and not name.lower().endswith(_OTHERS))
