"""Tests of deit/viz."""
