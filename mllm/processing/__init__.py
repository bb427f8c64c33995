"""Makes the inputs of the model from text, media and a budget."""
