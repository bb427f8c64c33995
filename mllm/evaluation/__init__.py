"""Evaluates a model at many budgets: the work list, answers on disk, metrics by task, tables and plots."""
