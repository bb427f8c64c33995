"""Encodes samples once with frozen encoders, and keeps the features on disk."""
