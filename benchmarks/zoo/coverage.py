"""``python -m benchmarks.zoo.coverage`` writes COVERAGE.md from the records; exit code 1 if one is a failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from spinpass.cli.screen import Screen

from . import folders, records, states
from .overrides import NOT_EXPORTABLE
from .records import Record
from .targets import Records, Run, covered, default_run, is_purely_offline, targets
from .variants import VARIANTS

_HEADINGS = {
    "decode": "Decoding: a KV cache in and out, several tokens, a batch",
    "bf16": "bfloat16",
    "fp16": "float16",
    "vision": "Text and images in one program",
    "decomposed": "After `run_decompositions()` with the default table",
}
_ROLES = ("R2", "R3", "R4")
_LONGEST, _LONGEST_REASON = 90, 240


def main(
    out: Annotated[Path, typer.Option(help="Where the sweep keeps its records.")] = records.OUT,
    to: Annotated[Path, typer.Option(help="The file to write.")] = Path("COVERAGE.md"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write the coverage table."""
    screen = Screen(as_json=as_json)
    found: dict[str, Records] = {variant: records.read_all(variant, out) for variant in VARIANTS}
    if not found["prefill"]:
        screen.error(f"no records under {out}; run python -m benchmarks.zoo.sweep first", "no records")
        raise typer.Exit(2)
    to.write_text(document(found), encoding="utf-8")
    failures = failed(found)
    summary = targets(found["prefill"], found["decode"])
    if as_json:
        counted = folders.counts(found["folder"])
        screen.document(
            {"ok": not failures, "failures": failures, "targets": [vars(t) for t in summary], "folders": counted}
        )
    if found["folder"]:
        screen.show(folders.summary(found["folder"], found["decode"]))
    screen.show(f"wrote {to}", *(f"FAILED {name}" for name in failures))
    raise typer.Exit(1 if failures else 0)


def failed(found: Mapping[str, Records]) -> list[str]:
    """``type (variant): status`` of every record that is a failure."""
    return [
        f"{name} ({variant}): {record['status']}"
        for variant, by_type in found.items()
        for name, record in by_type.items()
        if records.is_failure(record, NOT_EXPORTABLE)
    ]


def document(found: Mapping[str, Records]) -> str:
    """The whole file."""
    prefill = found.get("prefill", {})
    types = {name: r for name, r in prefill.items() if "@" not in name}
    measured = {name: r for name, r in types.items() if r.get("runs") or records.is_failure(r, NOT_EXPORTABLE)}
    switches = {name: r for name, r in prefill.items() if "@" in name}
    parts = [_head(types), _summary(prefill, found.get("decode", {})), _failures(found)]
    parts += ["## Model types", _LEGEND, _types(measured)]
    if switches:
        parts += ["## Switches of a configuration", _types(switches)]
    parts += ["## Types that do not become a program", _unexported(types.keys() - measured.keys(), types)]
    for variant, heading in _HEADINGS.items():
        if found.get(variant):
            parts += [f"## {heading}", _variant(found[variant])]
        if variant == "decode" and found.get("folder"):
            parts += folder_section(found["folder"], found.get("decode", {}))
    return "\n\n".join(part for part in parts if part) + "\n"


def folder_section(found: Records, decode: Records) -> list[str]:
    """The way of a user: how far every type comes, and why those that do not generate stop."""
    stops = [(name, status, _cell(why, _LONGEST_REASON)) for name, status, why in folders.others(found)]
    parts = ["## Folders: saved, exported, opened, generating past every window", folders.summary(found, decode)]
    stale = _stale(found, "folder")
    parts += [f"**{stale} of {len(found)} records were measured with other sources than these.**"] if stale else []
    return parts + ([table(("type", "comes to", "why not farther"), stops)] if stops else [])


_LEGEND = """R1: `offline` in the residual stream (`+ n`: with n online parts, those at the ends of a table shared with
the head), `online n` with n Hadamards at the inputs of linears; `untied: offline` where `tied="untie"` leaves nothing
online. R2, R3, R4: rotated at how many of the attentions and down projections that the graph has; for R2 without
attentions where something works channel by channel between the linear layers (a gate on the result, RoPE on the
values). Error: the largest relative error of any output, both programs lifted to the dtype in the next column; the
worst of three configurations. Seconds: of CPU time, for an uncertified `transform`."""


def _head(types: Records) -> str:
    stale = _stale(types)
    lines = [
        "# Coverage",
        "",
        "Every causal language model type of transformers, as a tiny model whose parameters are all random, exported, "
        'rotated in three configurations (the default, `tied="untie"`, `form="online"`) and compared with the '
        "original. Written by `make zoo` from the records of `python -m benchmarks.zoo.sweep`; do not edit.",
    ]
    if stale:
        lines += ["", f"**{stale} of {len(types)} records were measured with other sources of the pass than these.**"]
    return "\n".join(lines)


def _stale(found: Records, variant: str = "prefill") -> int:
    """Count those that were measured with other sources of the product than the present ones."""
    now = records.pass_version(variant=variant)
    return sum(record.get("sources", {}).get("pass") != now for record in found.values())


def _summary(prefill: Records, decode: Records) -> str:
    rows = [(t.what, t.measured, t.wanted, "yes" if t.reached else "**no**") for t in targets(prefill, decode)]
    return table(("", "measured", "wanted", "reached"), rows)


def _failures(found: Mapping[str, Records]) -> str:
    failures = failed(found)
    return "## Failures\n\n" + "\n".join(f"- {line}" for line in failures) if failures else ""


def _types(found: Records) -> str:
    rows = [
        (
            name,
            stream(record),
            *(_fraction(*covered(record, role)) for role in _ROLES),
            reasons(record),
            *_error(record),
            _seconds(default_run(record)),
        )
        for name, record in found.items()
    ]
    return table(("type", "R1", *_ROLES, "refused, and why", "error", "dtype", "s"), rows)


def _unexported(names: Iterable[str], found: Records) -> str:
    rows = [(n, NOT_EXPORTABLE.get(n) or _cell(str(found[n].get("why", found[n]["status"])))) for n in sorted(names)]
    return table(("type", "why"), rows)


def _variant(found: Records) -> str:
    """A line of counts, the differences from it, and the types whose program cannot be made."""
    made = {name: r for name, r in found.items() if r["status"] not in (states.NOT_BUILT, states.NOT_EXPORTED)}
    same = [r for r in made.values() if r["status"] == states.SAME]
    worst = max((float(_worst_run(r).get("error", 0)) for r in same), default=0.0)
    sums = {role: [sum(n) for n in zip(*(covered(r, role) for r in made.values()))] or [0, 0] for role in _ROLES}
    counts = ", ".join(f"{role} at {done} of {places}" for role, (done, places) in sums.items())
    text = f"{len(made)} programs, {len(same)} of the same function, relative error at most {worst:.1e}; {counts}."
    loops = [loop for r in same for run in r["runs"].values() if (loop := run.get("greedy"))]
    if loops:
        equal = sum(loop["tokens_equal"] for loop in loops)
        text += f" Greedy tokens from an empty cache equal in {equal} of {len(loops)} runs that could be made."
    stale = _stale(made)
    if stale:
        text += f" **{stale} of them were measured with other sources of the pass than these.**"
    others = [(n, r["status"], _cell(_why(r))) for n, r in found.items() if r["status"] != states.SAME]
    return text + ("\n\n" + table(("type", "status", "why"), others) if others else "")


# -- cells -----------------------------------------------------------------------------------------------------------


def stream(record: Record) -> str:
    """Where R1 ended up in the default configuration."""
    run = default_run(record)
    if run.get("status") != states.SAME:
        status = run.get("status", record["status"])
        return status if status == states.REFUSED else f"**{status}**"
    streams = run["streams"]
    offline = [s["parts"] for s in streams if s["form"] == "offline"]
    online = sum(s["parts"] for s in streams if s["form"] == "online")
    texts = [f"offline + {sum(offline)}" if sum(offline) else "offline"] if offline else []
    texts += [f"online {online}"] if online else []
    if (sum(offline) or not offline) and record["runs"].get("untie") and is_purely_offline(record):
        texts.append("untied: offline")
    return ", ".join(texts) or "–"


def reasons(record: Record) -> str:
    """The refusals of the default configuration, each once, without the names of nodes; or what went wrong."""
    run = default_run(record)
    if record["status"] not in (states.SAME, states.REFUSED):
        return _cell(_why(record))
    texts: Counter[str] = Counter()
    for refusal in run.get("refusals", ()):
        role = refusal["what"][:2]
        if refusal["what"] in _ROLES and not record["places"].get(role):
            continue  # nothing there, nothing refused
        kind = "R1 offline" if refusal["what"].startswith("R1 offline") else role
        texts[f"{kind}: {short(refusal['why'])}"] += 1
    return "; ".join(f"{text} ({count}×)" if count > 1 else text for text, count in texts.items()) or "–"


def short(why: str) -> str:
    """A reason without node names and the parts that are the same everywhere."""
    why = re.sub(r"; rotated online at the linears' inputs instead.*", "", why)
    why = re.sub(r"the residual stream needs (\d+ online parts?) \(the first at \S+: (.*)\)$", r"\1, \2", why)
    why = re.sub(r"\b\w+_\d+\b", "…", why)
    return _cell(why)


def _why(record: Record) -> str:
    runs = record.get("runs", {}).values()
    found: str = record.get("why") or next((r["why"] for r in runs if r.get("why")), "")
    lines = found.strip().splitlines()
    return lines[-1] if lines else ""


def _worst_run(record: Record) -> Run:
    runs = [r for r in record.get("runs", {}).values() if r.get("error") is not None]
    return max(runs, key=lambda r: float(r["error"]), default={})


def _error(record: Record) -> tuple[str, str]:
    run = _worst_run(record)
    return (f"{float(run['error']):.1e}", run["dtype"]) if run else ("–", "–")


def _seconds(run: Run) -> str:
    return f"{run['seconds']:.2f}" if "seconds" in run else "–"


def _fraction(done: int, places: int) -> str:
    return f"{done}/{places}" if places else "–"


def _cell(text: str, longest: int = _LONGEST) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    typer.run(main)
