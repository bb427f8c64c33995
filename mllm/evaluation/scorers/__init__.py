"""Scores answers by the rules of vision benchmarks, quirks included."""
