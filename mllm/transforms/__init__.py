"""Transforms decoded media to what encoders read: pixels, log-mel windows, waveforms, lip crops."""
