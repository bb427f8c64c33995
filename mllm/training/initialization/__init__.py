"""Starts a run: from another run, or with projectors fitted to captions in closed form."""
