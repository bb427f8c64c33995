"""The garbage collector rests while many objects are made, and comes back whatever happens."""

import gc

import pytest

from mllm.utils.collector import collector_paused


def test_the_collector_comes_back_also_after_an_error_and_stays_off_where_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="half way"), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ValueError("half way")
    assert gc.isenabled()
