"""Whose turn it is where several parties wait for one machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that goes, of those who wait for it, to the party that had it longest ago, and of its calls to the oldest."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._waiting: list[tuple[str, int]] = []
        self._calls = self._turns = 0
        self._had: dict[str, int] = {}  # by party the number of its last turn

    def locked(self) -> bool:
        """Return whether someone has it."""
        return self._held

    @contextmanager
    def of(self, party: str) -> Iterator[None]:
        """Hold it, as soon as it is this party's turn.

        Args:
            party: Who waits.
        """
        with self._changed:
            self._calls += 1
            mine = (party, self._calls)
            self._waiting.append(mine)
            try:
                self._changed.wait_for(lambda: not self._held and self._next() == mine)
            finally:
                self._waiting.remove(mine)
            self._turns += 1
            self._held, self._had[party] = True, self._turns
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def _next(self) -> tuple[str, int]:
        return min(self._waiting, key=lambda waiting: (self._had.get(waiting[0], 0), waiting[1]))
