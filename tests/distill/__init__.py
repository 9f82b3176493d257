"""Tests of deit/distill."""
