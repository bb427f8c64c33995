"""Holds every key that a user writes in YAML or on the command line, as dataclasses. Nothing here loads torch."""
