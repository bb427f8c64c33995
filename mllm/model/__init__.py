"""Holds the elastic model: encoders, compressors and an unmodified decoder LLM, as a native transformers model."""
