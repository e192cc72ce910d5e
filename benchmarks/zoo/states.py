"""The states of a record: what became of a type; those of one configuration of the pass are the first seven,
and those from "refused late" on are about folders."""

from __future__ import annotations

SAME = "same function"
REFUSED = "refused"
UNCHECKED = "unchecked"  # transformed, but the programs cannot be run or return nothing to compare
NOISIER = "noisier"  # the same function in float64; rounding in its own dtype shows more than the certificate allows
CHANGED = "changed output"
UNTYPED = "untyped exception"
BROKEN = "broken invariant"
NOT_BUILT = "not built"
NOT_EXPORTED = "not exported"
DIED = "died"  # out of time or memory
LATE = "refused late"  # by the export of a folder, behind the minutes that a rotation may take
WRITTEN = "written"  # the folder cannot be opened
OPENS = "opens"  # the folder does not generate what transformers does
GENERATES = "generates"
RUNNING = "running"
FAILURES = (CHANGED, UNTYPED, BROKEN, DIED, LATE, WRITTEN, OPENS)
