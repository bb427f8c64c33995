"""Turns files into samples and samples into batches: the manifest, readers, checks, the data set."""
