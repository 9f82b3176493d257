"""Helpers independent of configuration and networks: errors, files, processes, devices."""
