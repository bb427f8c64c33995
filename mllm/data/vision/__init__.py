"""Reads vision benchmarks from the files that people download, with the official prompts."""
