"""Tests of deit/deploy/export.py."""
