"""Tests of deit/core."""
