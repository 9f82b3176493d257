"""Tests of deit/evaluation."""
