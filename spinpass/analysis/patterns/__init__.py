"""Where rotations could go: each file finds seeds for the basis analysis, and edits nothing."""
