"""The report as values."""

from __future__ import annotations

import json

from tests.support import reports


def test_the_numbers_are_one_json_document() -> None:
    found = json.loads(json.dumps(reports.report().to_dict(), allow_nan=False))
    sites = found["activations"]["sites"]
    assert len(sites) == len(reports.report().pairs) and sites[0]["before"]["max_over_median"] > 1
    scheme = found["schemes"][reports.SCHEME]
    assert scheme["rotated"]["errors"].keys() == scheme["original"]["errors"].keys()
    assert scheme["original"]["bytes"] == scheme["rotated"]["bytes"] < found["bytes"]["before"]
    assert [row[:2] for row in reports.report().perplexities()][-1] == (reports.SCHEME, "rotated")
