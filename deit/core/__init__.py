"""Plumbing that knows neither the configuration nor a network: errors, files, processes,
devices."""
