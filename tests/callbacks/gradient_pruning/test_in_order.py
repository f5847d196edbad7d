"""Jobs on a thread, one after another."""

import pytest
import torch
from torch.futures import Future

from fulgurite.callbacks.gradient_pruning.clock import Clock
from fulgurite.callbacks.gradient_pruning.in_order import InOrder


def done(value):
    future = Future()
    future.set_result(value)
    return future


def test_jobs_run_in_their_order_and_those_that_fail_do_not_stop_the_others():
    seen, first = [], Future()
    order = InOrder()

    def job(number):
        seen.append(number)
        return first if number == 0 else done(number)

    def fails():
        raise RuntimeError("Connection closed by peer")

    futures = [order.do(lambda number=number: job(number)) for number in range(3)]
    broken, behind = order.do(fails), order.do(lambda: job(3))
    assert [future.wait() for future in (*futures[1:], behind)] == [1, 2, 3]  # none waits for what another's job has begun
    assert seen == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="closed by peer"):
        broken.wait()
    first.set_result("late")
    assert futures[0].wait() == "late"


def test_what_a_jobs_future_raises_is_raised():
    def fails(future):
        raise RuntimeError("Timed out waiting")

    with pytest.raises(RuntimeError, match="Timed out"):
        InOrder().do(lambda: done(1).then(fails)).wait()


def test_seconds_under_way_are_counted_once_and_waiting_begins_behind_the_backward_passes_last_message(monkeypatch):
    clock = Clock()
    for posted, arrived, answer in [(0.0, 2.0, False), (1.0, 3.0, False), (3.5, 5.0, True), (4.0, 6.0, True)]:
        monkeypatch.setattr(clock, "mark", lambda device, moment=arrived: moment)
        clock.arrived(posted, torch.device("cpu"), answer=answer)
    assert clock.times() == (5.5, 4.5)  # 0 to 3 and 3.5 to 6; of that, behind 1
    clock.restart()
    assert clock.times() == (0.0, 0.0)
