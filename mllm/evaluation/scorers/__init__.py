"""What an answer is worth by the rules of vision benchmarks, quirks included."""
