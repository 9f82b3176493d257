"""Tests of resuming a run."""
