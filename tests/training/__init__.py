"""Tests of deit/training."""
