"""Reads models from disk and writes them: frozen parts, runs and standalone exports."""
