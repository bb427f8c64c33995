"""Pre-training of the small frozen parts that come with the synthetic corpus."""
