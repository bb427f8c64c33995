"""Training: which budgets a step trains, the loss, the loop, checkpoints, and how a run is launched."""
