"""Tests of int8 files."""
