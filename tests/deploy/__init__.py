"""Tests of deit/deploy."""
