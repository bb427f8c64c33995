"""Media files to raw arrays, under limits, with one error type."""

from mllm.media.errors import ERROR_KINDS, ErrorKind, MediaError
from mllm.media.paths import path_problem, resolve_media

__all__ = ["ERROR_KINDS", "ErrorKind", "MediaError", "path_problem", "resolve_media"]
