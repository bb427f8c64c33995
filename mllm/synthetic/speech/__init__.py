"""Makes synthetic speech, drawn lips, and the speech corpus."""
