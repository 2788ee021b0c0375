from __future__ import annotations

import pytest

from syncbn_comm import FutureResult, SyncError, SyncTimeoutError


def test_what_one_thread_puts_another_gets_again_and_again(threads):
    there, back = FutureResult(), FutureResult()

    def echo():
        for _ in range(100):
            back.put(there.get())

    def ask():
        answers = []
        for number in range(100):
            there.put(number)
            answers.append(back.get())
        return answers

    assert threads.run(ask, echo)[0] == list(range(100))


def test_none_is_a_value_like_any_other():
    future = FutureResult()
    future.put(None)
    assert future.get() is None


def test_a_second_put_is_refused_and_keeps_the_first():
    future = FutureResult()
    future.put(1)
    with pytest.raises(SyncError, match="expected a get between two puts, got two puts") as caught:
        future.put(2)
    assert isinstance(caught.value, ValueError)
    assert future.get() == 1


def test_a_get_that_times_out_changes_nothing():
    future = FutureResult()
    with pytest.raises(SyncTimeoutError, match=r"timed out after 0\.01 s: expected a result to be put"):
        future.get(timeout=0.01)
    future.put("later")
    assert future.get() == "later"
