"""Tables, charts and HTML pages from plain values; no torch."""
