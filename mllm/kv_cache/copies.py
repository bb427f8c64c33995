"""Copies a cache, so that what is read next is not kept in the one that was there.

Knows caches of transformers. Does not know what is read.
"""

import copy

from transformers import DynamicCache


def copy_of(cache: DynamicCache) -> DynamicCache:
    """Copy a cache that grows by itself. Appending makes new tensors, so those that are there are not copied."""
    copied = DynamicCache()
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
