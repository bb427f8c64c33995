"""What a run starts from: another run, or projectors fitted to captions in closed form."""
