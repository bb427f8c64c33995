"""Raw recordings of talking people to what the lip pipeline reads: upright mouth crops and sound that keeps time.

    prepare(settings)     a file or a folder of recordings to crops, sound, report, manifest and contact sheet

Knows recordings, faces and where mouths are. Does not know models, budgets or tokens.
"""
