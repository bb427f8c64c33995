"""Keeps key-value caches that several rows, beams or requests share."""
