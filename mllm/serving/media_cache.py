"""Keeps media that were read before, by their contents: each is decoded and encoded once, while there is room.

Knows items, keys and bytes. Does not know files or models.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from mllm.budget import Extent
from mllm.model.modeling import Features
from mllm.processing.media_inputs import LoadedMedia


@dataclass(eq=False)
class MediaItem:
    """Holds one medium of a request: as its encoder wants it, and once it was encoded what that gave.

    Only the thread that owns the model sets `features`.
    """

    loaded: LoadedMedia
    extent: Extent
    features: Features | None = None

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""
        values = self.loaded.values
        num_bytes = values.numel() * values.element_size()
        return num_bytes if self.features is None else num_bytes + _bytes_of(self.features)

    def keep(self, features: Features) -> None:
        """Take what the encoder gave; its input is not needed any more."""
        values = self.loaded.values
        # How many images it is, is read from its first axis.
        left = values.new_empty((len(values), *[0] * (values.ndim - 1)))
        self.loaded = replace(self.loaded, values=left)
        self.features = features


@dataclass(frozen=True)
class Window:
    """Holds a stretch of a request's media, in seconds; all of them, where nothing was cut."""

    start: float
    stop: float
    items: tuple[MediaItem, ...]


Windows = tuple[Window, ...]


class MediaCache:
    """Keeps windows of media by key, the last used ones.

    Args:
        max_bytes: of all items together; what is in use counts, and is only let go of here.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[str, Windows] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._making: dict[str, Future[Windows]] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Count the bytes of what is kept, as far as it is known."""
        return sum(list(self._sizes.values()))

    def get(self, key: str, make: Callable[[], Windows]) -> tuple[Windows, bool]:
        """Find what a key stands for, and whether it was there; what two ask for at once is made once.

        Raises:
            Exception: what `make` raises; nothing is kept then, and whoever waited for it makes its own.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.num_hits += 1
                return self._kept[key], True
            waiting = self._making.get(key)
            if waiting is None:
                self.num_misses += 1
                self._making[key] = future = Future()
        if waiting is not None:
            return self._shared(key, waiting, make)
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._kept[key] = made
        self.settle(key)
        future.set_result(made)
        return made, False

    def _shared(self, key: str, waiting: "Future[Windows]", make: Callable[[], Windows]) -> tuple[Windows, bool]:
        try:
            made = waiting.result()
        except Exception:  # the other one's client may have left, or its file is broken, which is told to both
            return self.get(key, make)
        with self._lock:
            self.num_hits += 1
        return made, True

    def settle(self, key: str) -> None:
        """Count a key's items anew, and let go of the longest unused ones beyond the limit."""
        with self._lock:
            if key in self._kept:
                self._sizes[key] = sum(item.num_bytes for window in self._kept[key] for item in window.items)
            while self._kept and sum(self._sizes.values()) > self.max_bytes:
                oldest, _ = self._kept.popitem(last=False)
                del self._sizes[oldest]


def _bytes_of(features: Features) -> int:
    return features.values.numel() * features.values.element_size()
