"""Samples: the manifest, readers, checks, the data set, batches."""
