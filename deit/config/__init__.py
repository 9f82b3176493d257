"""What a run is asked to do: typed sections, presets, checks, recipes; no torch."""
