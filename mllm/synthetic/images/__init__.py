"""Makes synthetic scenes, questions about them, and the image corpus."""
