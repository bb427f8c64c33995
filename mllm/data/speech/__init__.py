"""Reads speech clips: lists, folders and corpora."""
