"""What holds for every test: the garbage collector leaves alone what the libraries made when they were imported."""

import gc


def pytest_collection_finish() -> None:
    """Freeze what importing made: millions of objects, which every full collection would look at again."""
    gc.collect()
    gc.freeze()
