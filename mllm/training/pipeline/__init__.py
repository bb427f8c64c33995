"""Makes micro-batches of manifests: loads and checks the data, counts tokens, assigns samples to processes."""
