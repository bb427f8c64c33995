"""Answers questions about media at a budget."""
