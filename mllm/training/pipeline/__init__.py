"""From manifests to the batches of a process, and what is known of them before a run."""
