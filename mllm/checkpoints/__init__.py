"""Models from and to disk: frozen parts, runs and standalone exports."""
