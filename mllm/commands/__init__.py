"""Holds the commands of the command line, one file each.

Each has a `SUMMARY`, a dataclass `Settings`, and `run(settings)`, which returns the exit code. Importing one loads
nothing heavy; that happens when it runs.
"""
