"""Pre-trains the small frozen synthetic parts: two encoders of speech, one of images, and an LLM."""
