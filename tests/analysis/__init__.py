"""Tests of deit/analysis."""
