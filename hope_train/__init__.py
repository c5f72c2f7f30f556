"""Pretraining of Hope, the model of "Nested Learning" (arXiv 2512.24695)."""

__version__ = "0.1.0"
