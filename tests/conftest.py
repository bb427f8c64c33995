"""What holds for every test: the garbage collector leaves alone what stays, such as what the libraries made."""

import gc
from collections.abc import Iterator

import pytest

# Importing makes millions of objects that stay. Until the tests begin there is nothing to collect among them.
gc.disable()
# Tests make many objects and little garbage that holds others: looking for it after every 700 took a tenth of the time.
gc.set_threshold(10_000, 20, 20)


def pytest_collection_finish() -> None:
    """Begin to collect, but not what importing made."""
    set_aside()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _what_stays_is_set_aside() -> Iterator[None]:
    """After every file, libraries that it was the first to import stay, and what the whole session shares."""
    yield
    set_aside()


def set_aside() -> None:
    """Freeze what is alive, which every full collection would look at again; training ends with one."""
    gc.collect()
    gc.freeze()
