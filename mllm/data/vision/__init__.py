"""Vision benchmarks from the files that people download to samples, with the official prompts."""
