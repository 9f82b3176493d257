"""Tests of stored teacher outputs."""
