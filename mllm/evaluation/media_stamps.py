"""Stamps the media files of a sample, so that answers about a file that has changed since are not kept.

Knows paths and what a folder says of a file: size and time. Opens nothing.
"""

import hashlib
import os

from mllm.data.manifest import Sample
from mllm.media.packed import file_stamp

DIGEST_BYTES = 8
NO_MEDIA = ""


def media_stamp_of(sample: Sample) -> str:
    """Return a stamp of the sizes and times of the sample's files, missing ones included; "" where it holds none.

    A file that was copied or touched looks changed, and is asked about again; reading all files instead would take as
    long as an evaluation of a small model.
    """
    if not sample.media:
        return NO_MEDIA
    stamps = [file_stamp(os.path.join(sample.root, part.path)) for part in sample.media]
    return hashlib.blake2b(repr(stamps).encode(), digest_size=DIGEST_BYTES).hexdigest()
