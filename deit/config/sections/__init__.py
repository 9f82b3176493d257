"""The sections of a configuration, one per file: the fields, defaults and help of each."""
