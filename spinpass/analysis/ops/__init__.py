"""Operators: what each of them does to the axes of its operands, as a rule."""
