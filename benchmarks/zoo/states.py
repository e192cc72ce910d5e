"""The states of a record: what became of a type; those of one configuration of the pass are the first seven."""

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
RUNNING = "running"
FAILURES = (CHANGED, UNTYPED, BROKEN, DIED)
