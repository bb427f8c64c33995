"""Makes speech, lip videos, images and text on this machine (the built-in world), so that the main job needs no download."""
