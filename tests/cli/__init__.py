"""Tests of deit/cli."""
