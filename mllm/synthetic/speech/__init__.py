"""Synthetic speech and lips, and the corpus made of them."""
