"""The built-in world: speech, lips, images and text made on this machine, so that the main job needs no download."""
