"""Runs the main job on the synthetic corpus, from an empty folder to a table: the short demo and the long ones."""
