"""The version of spinpass, in the one place where it stands. What is built, written and printed reads it from here."""

__version__ = "0.1.0"
