"""``spinpass schemes``: what is listed is what is parsed."""

from __future__ import annotations

from spinpass.folders import BITS
from spinpass.quantization import ALIASES, PARTS, QuantizationConfig
from tests.support.commands import document, run


def test_schemes_lists_parts_names_and_recipes() -> None:
    found = document(run("schemes", "--json"))
    assert [part["example"] for part in found["parts"]] == [part.example for part in PARTS]
    assert found["names"] == ALIASES and set(found["bits"]) == set(map(str, BITS))
    for bits, scheme in found["bits"].items():
        if bits != "16":
            assert QuantizationConfig.parse(scheme).weights is not None
    assert set(found["measured"]["rows"]) <= set(found["bits"])
    for bits, row in found["measured"]["rows"].items():
        assert row["scheme"] == found["bits"][bits] and row["mb"] > 0 and 0.9 < row["mean"] <= row["worst"]
    shown = run("schemes")
    assert shown.exit_code == 0
    for word in ("w4g64", "distill", "w4a8", "q4_0", "MatMulNBits", "--bits"):
        assert word in shown.stdout
