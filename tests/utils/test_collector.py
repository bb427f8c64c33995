"""The garbage collector rests while many objects are made, and comes back whatever happens."""

import gc

import pytest

from mllm.utils.collector import collector_paused, leave_out_of_collections


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


def test_what_is_left_out_is_not_looked_through_again() -> None:
    before = gc.get_freeze_count()
    kept = [[number] for number in range(1_000)]
    leave_out_of_collections()
    assert gc.get_freeze_count() >= before + len(kept)
