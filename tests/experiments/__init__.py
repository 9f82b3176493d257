"""Tests of deit/experiments."""
