"""Fuzz tests of the commands: random inputs, and the ends that are documented."""
