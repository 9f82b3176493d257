"""Tables, charts and HTML from plain values; no torch."""
