"""Lays many rows out in one, with every beginning that rows share held once."""
