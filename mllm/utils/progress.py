"""Names the function by which long work reports how far it is, whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""It is called with what is being done, how much of it is done, and how much there is."""
