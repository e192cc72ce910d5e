"""Edits, one per file. Each takes the editor and a decided site, and searches for nothing."""
