"""Names the exit codes of the command line; 128 + n after a signal n is the shell's own."""

DONE = 0
NEEDS_ATTENTION = 1
"""Done, but something needs attention: failed samples, a bad manifest, a damaged folder, a broken installation."""
REFUSED = 2
"""What the user asked for cannot be done, or the machine refused it."""
BROKEN_DOWN = 3
"""A run ended itself: its numbers are finite no more, or nothing moved in it for too long."""
INTERRUPTED = 130
