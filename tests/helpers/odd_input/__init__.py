"""Commands with odd input: what they are tried with, and what is right of their ends."""
