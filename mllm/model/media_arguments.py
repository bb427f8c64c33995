"""Names the media arguments of the model's forward pass: the raw values per medium, their sizes, and all of them."""

from mllm.budget import MEDIA

VALUE_KEYS = {"image": "pixel_values", "audio": "audio_values", "video": "video_values"}
SIZE_KEYS = {"image": "image_grids", "audio": "audio_lengths", "video": "video_lengths"}
"""What says how large each raw item truly is; images need it where they keep their shape."""
# What the forward pass takes per medium, beside the raw values.
MEDIA_KEYS = (
    *("pixel_values", "image_grids", "num_image_tokens", "image_index", "image_layout"),
    *(f"{medium}_{name}" for medium in ("audio", "video") for name in ("values", "lengths", "rates", "index")),
    *("num_audio_tokens", "num_video_tokens"),
)

assert set(VALUE_KEYS) == set(MEDIA)
