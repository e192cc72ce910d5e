"""Whether the memory holds a written model in its runtime. One that it does not hold is certified, and not run here."""

from __future__ import annotations

from pathlib import Path

from .machine import free_memory, own_memory, said

SESSION_FLOATS, SESSION_INTEGERS = 1.2, 2.0
"""Bytes that ONNX Runtime takes for each of a file of floats, and of integers, which it also keeps in another order."""


def no_room(folder: Path, allowed: int | None, *, integers: bool) -> str:
    """Return why the model of a folder is not run here; empty where it can be.

    Args:
        folder: that was written.
        allowed: bytes that this process and those it begins may take; None for what is free.
        integers: whether its weights are.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    needed = int(size * (SESSION_INTEGERS if integers else SESSION_FLOATS))
    there = free_memory() if allowed is None else max(0, allowed - own_memory())
    if needed <= there:
        return ""
    whose = "are free" if allowed is None else "are left of --memory"
    return f"ONNX Runtime takes about {said(needed)} for it, and {said(there)} {whose}: run it on a machine with more"
