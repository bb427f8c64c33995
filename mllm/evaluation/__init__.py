"""Samples at many budgets to a table and a plot: the work list, answers on disk, metrics by task, the report."""
