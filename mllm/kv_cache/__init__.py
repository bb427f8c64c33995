"""Key-value caches that several rows, beams or requests share."""
