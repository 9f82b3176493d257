"""Losses, teachers, and teacher outputs stored and verified."""
