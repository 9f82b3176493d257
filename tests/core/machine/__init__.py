"""Tests of deit/core/machine."""
