"""The main job on the synthetic corpus, from nothing to a table: the short demo and the long ones."""
