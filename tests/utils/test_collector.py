"""The garbage collector rests while many objects are made, and comes back whatever happens."""

import gc

import pytest

from mllm.utils.collector import collector_paused


def fail_inside() -> None:
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()  # it was off before the inner one
        raise ValueError("half way")


def test_the_collector_comes_back_also_after_an_error_and_stays_off_where_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="half way"):
        fail_inside()
    assert gc.isenabled()
