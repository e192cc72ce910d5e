"""Pictures of a report, decoded."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree

from PIL import Image  # a dependency of matplotlib


def check_picture(uri: str) -> int:
    """It is SVG that can be parsed, and so are the bitmaps in it, which are counted."""
    head, data = uri.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(base64.b64decode(data, validate=True))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    bitmaps = list(root.iter("{http://www.w3.org/2000/svg}image"))
    for bitmap in bitmaps:
        inner, pixels = bitmap.attrib["{http://www.w3.org/1999/xlink}href"].split(",", 1)
        assert inner == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(pixels)))
        assert len(image.convert("RGBA").getcolors(1 << 24) or []) > 1, "something is painted"
    return len(bitmaps)
