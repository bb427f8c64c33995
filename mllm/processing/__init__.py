"""Text, media and a budget to the inputs of the model."""
