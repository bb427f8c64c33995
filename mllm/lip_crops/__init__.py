"""Turns raw recordings of talking people into what the lip pipeline reads: upright mouth crops and audio that keeps
time.

    prepare(settings)     a file or a folder of recordings to crops, audio, report, manifest and contact sheet

Knows recordings, faces and where mouths are. Does not know models, budgets or tokens.
"""
