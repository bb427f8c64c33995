"""Makes speech, lip videos, images and text on this machine, the built-in world: the main job needs no download."""
