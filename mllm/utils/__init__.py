"""Helpers that every other package may use: progress, files, the environment."""
