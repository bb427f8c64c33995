"""Synthetic scenes and questions about them, and the corpus made of them."""
