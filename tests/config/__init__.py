"""Tests of deit/config."""
