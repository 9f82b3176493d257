"""What a finished run is worth: measure, predict, compare."""
