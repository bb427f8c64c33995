"""Decodes media files to raw arrays, under limits, with one error type.

    load_image(path)  an image, upright RGB          load_audio(path)  one channel at the rate asked for
    load_video(path)  frames at the rate asked for    MediaLoader       the three behind one call
    MediaError        whatever is wrong with a file   resolve_media     which files may be opened at all
    decode_in_memory  what a caller has in memory
    stream_video      frames one at a time            write_video, write_audio    crops and their audio

Knows files, formats and limits. Does not know what an encoder wants (`transforms/encoder_inputs.py` does).
"""

from mllm.media.audio import Audio, load_audio, resample
from mllm.media.av_sync import MAX_MISMATCH_SECONDS, audio_as_long_as_video
from mllm.media.errors import ERROR_KINDS, ErrorKind, MediaError
from mllm.media.image import load_image, to_rgb
from mllm.media.in_memory import InMemoryMedium, MediaInput, decode_in_memory, is_file, items_of, path_of
from mllm.media.limits import DEFAULT_LIMITS, MediaLimits
from mllm.media.loader import MediaLoader, Reader, RememberingLoader
from mllm.media.paths import RootedPaths, path_problem, resolve_media
from mllm.media.video import FrameSampling, Video, load_video, stream_video, to_gray
from mllm.media.writing import write_audio, write_video

__all__ = [
    "DEFAULT_LIMITS",
    "ERROR_KINDS",
    "MAX_MISMATCH_SECONDS",
    "Audio",
    "ErrorKind",
    "FrameSampling",
    "InMemoryMedium",
    "MediaError",
    "MediaInput",
    "MediaLimits",
    "MediaLoader",
    "Reader",
    "RememberingLoader",
    "RootedPaths",
    "Video",
    "audio_as_long_as_video",
    "decode_in_memory",
    "is_file",
    "items_of",
    "load_audio",
    "load_image",
    "load_video",
    "path_of",
    "path_problem",
    "resample",
    "resolve_media",
    "stream_video",
    "to_gray",
    "to_rgb",
    "write_audio",
    "write_video",
]
