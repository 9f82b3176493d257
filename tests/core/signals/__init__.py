"""Tests of deit/core/signals.py and of all that ends by a signal."""
