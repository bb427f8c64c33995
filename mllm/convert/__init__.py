"""Reads checkpoints that other systems released: one file per system, and one reader for files that hold pickles."""
