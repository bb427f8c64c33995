"""Chooses the budget of a request by itself: as few soft tokens as its question needs."""
