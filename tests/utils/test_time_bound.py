"""Code that runs too long is ended, in the thread that runs it, and leaves nothing behind."""

import sys
import threading
import time

import pytest

from mllm.utils.time_bound import TooSlowError, at_most

ENDLESS = compile("while True:\n    pass\n", "<endless>", "exec")


def ended() -> str:
    with (
        pytest.raises(TooSlowError, match=r"a loop takes longer than 0\.1 seconds") as error,
        at_most(0.1, "<endless>", "a loop"),
    ):
        exec(ENDLESS)
    return str(error.value)


def test_an_endless_loop_ends_in_any_thread() -> None:
    before, told = sys.gettrace(), []
    ended()
    assert sys.gettrace() is before
    thread = threading.Thread(target=lambda: told.append(ended()))
    thread.start()
    thread.join(10)
    assert told


def test_other_code_is_left_alone() -> None:
    with at_most(0.0, "<endless>", "a loop"):
        assert sum(number for number in range(1_000)) == 499_500
        time.sleep(0.01)
