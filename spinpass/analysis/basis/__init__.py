"""Spaces: which tensor axes must share one basis, found by walking from a seed over the whole graph."""
