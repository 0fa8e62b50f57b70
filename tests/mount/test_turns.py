"""Changes of one image come one after the other, however many want to make one."""

import threading
from contextlib import ExitStack

import pytest

from fusefs.turns import Turns


def test_who_comes_while_others_wait_waits_too(stack: ExitStack) -> None:
    turns, entered, leave = Turns(), [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def change(number: int) -> None:
        with turns.take("image"):
            entered[number].set()
            assert leave[number].wait(20)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(2)]
    for event in leave:
        stack.callback(event.set)
    threads[0].start()
    assert entered[0].wait(20)
    threads[1].start()
    assert not entered[1].wait(0.1)
    leave[0].set()
    assert entered[1].wait(20)
    # Whoever was first has left, and somebody is in.
    threads.append(threading.Thread(target=change, args=(2,)))
    threads[2].start()
    assert not entered[2].wait(0.1)
    leave[1].set()
    assert entered[2].wait(20)
    leave[2].set()
    for thread in threads:
        thread.join(20)
    assert not turns.is_taken("image")


def test_others_do_not_wait_and_an_error_lets_the_next_one_in() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="in it"), turns.take("image"), turns.take("other"):
        assert turns.is_taken("image")
        raise ValueError("in it")
    with turns.take("image"):
        pass
    assert not turns.is_taken("image")
