"""Whose turn it is among parties that wait."""

import threading
import time

from fulgurite.modules.offsite.turns import Turns


def test_a_party_with_many_calls_does_not_push_others_back():
    turns, order = Turns(), []

    def call(party):
        with turns.of(party):
            order.append(party)

    with turns.of("many"):
        threads = []
        for party in ("many", "many", "many", "few", "other"):
            threads.append(threading.Thread(target=call, args=(party,)))
            threads[-1].start()
            while len(turns._waiting) < len(threads):
                time.sleep(0.001)
        assert turns.locked()
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == ["few", "other", "many", "many", "many"]
    assert not turns.locked()


def test_a_call_that_fails_gives_its_turn_up():
    turns = Turns()
    for _ in range(2):
        try:
            with turns.of("one"):
                raise ValueError
        except ValueError:
            pass
    with turns.of("two"):
        assert turns.locked()
    assert not turns._waiting
