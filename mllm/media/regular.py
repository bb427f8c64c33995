"""Opens a regular file without following a link put in its place after the path was resolved.

Knows paths and descriptors. Does not know formats or limits.
"""

import os
import stat

from mllm.media.errors import MediaError


def open_regular(name: str, path: str) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Args:
        name: what the file is called in messages.

    Raises:
        MediaError: missing, or refused (no regular file, no permission).
    """
    try:
        descriptor = os.open(os.path.realpath(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise MediaError("missing", name, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise MediaError("refused", name, "the file cannot be opened") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MediaError("refused", name, "not a regular file")
    return descriptor
