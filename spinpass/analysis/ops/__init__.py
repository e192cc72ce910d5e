"""What each operator does to the axes of its operands, as a rule."""
