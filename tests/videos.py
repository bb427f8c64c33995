"""What tests of video need of PyAV and decord, and not every supported release of PyAV has."""

from importlib.util import find_spec
from typing import Any

import av
import pytest
from packaging.version import Version

needs_decord = pytest.mark.skipif(
    find_spec("decord") is None or Version(av.__version__) < Version("18.1"), reason="needs the extra decord"
)


def turn(stream: Any, degrees: int) -> None:
    """Write into a stream by how much a player turns it; PyAV writes it from 18 on, and reads it in every release."""
    if not hasattr(stream, "set_display_rotation"):
        pytest.skip(f"PyAV {av.__version__} writes no rotation")
    stream.set_display_rotation(degrees)
