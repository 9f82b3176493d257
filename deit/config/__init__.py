"""The configuration of a run: typed sections, presets, checks and recipes, without torch."""
