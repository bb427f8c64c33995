"""What holds for every test: the garbage collector leaves alone what the libraries made when they were imported."""

import gc

# Importing makes millions of objects that stay. Until the tests begin there is nothing to collect among them.
gc.disable()


def pytest_collection_finish() -> None:
    """Freeze what importing made, which every full collection would look at again."""
    gc.collect()
    gc.freeze()
    gc.enable()
