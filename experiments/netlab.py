"""A slow network on one machine: a namespace a rank, joined by links whose rate is set, changed while they run, cut and restored.

Linux only, as root, with ``ip`` and ``tc`` (package ``iproute2``). Each namespace has one interface, ``eth0``, that ends in a
bridge; both ends are shaped by a token bucket filter, so that a rank neither sends nor receives faster than its link.
"""

import atexit
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import InputError
from .threads import threads_each

_PREFIX = "fg"  # of all namespaces; the process that made one stands behind it
_RATE = re.compile(r"^\d+(\.\d+)?(k|m|g)bit$")
Function = TypeVar("Function", bound=Callable[..., Any])


def what_is_missing() -> str | None:
    """Return why no network can be made here, or None."""
    if not Path("/proc/self/ns/net").exists():
        return "network namespaces need Linux"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"ip netns add: {done.stderr.strip()}" if done.returncode else None


def needs_links(argument: str | None = None) -> Callable[[Function], Function]:
    """Mark a function that makes a network: a benchmark that calls it is refused at its start where none can be made.

    Args:
        argument: Argument without which the function makes none; None: it always makes one.
    """

    def mark(function: Function) -> Function:
        def missing(arguments: dict[str, Any]) -> str | None:
            lacking = what_is_missing() if argument is None or arguments.get(argument) is not None else None
            return lacking and f"makes a network, and here {lacking}"

        function.what_is_missing = missing  # type: ignore[attr-defined]
        return function

    return mark


class NetLab:
    """Some ranks, each in a namespace of its own with the address ``10.77.0.<rank + 1>``; a context manager.

    What a killed lab left behind is removed when the next one is made.

    Args:
        ranks: How many.
        rate: Of every link, in each direction: ``100mbit``.
        burst: Bytes that may go at once.

    Raises:
        InputError: If a value is out of range, or no network can be made here; the message says what is missing.

    Example:
        ``with NetLab(2, "20mbit") as lab: lab.start(0, [sys.executable, "train.py"])``
    """

    def __init__(self, ranks: int, rate: str = "1gbit", *, burst: str = "64kb") -> None:
        if not 2 <= ranks <= 200:
            raise InputError(f"ranks={ranks}: legal is 2 to 200.")
        missing = what_is_missing()
        if missing:
            raise InputError(f"No network can be made here: {missing}.")
        self.ranks, self.burst, self.rate = ranks, burst, check_rate(rate)
        self.name = f"{_PREFIX}{os.getpid()}"
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "NetLab":
        """Make the network."""
        remove_left_overs()
        self._remove()
        atexit.register(self._remove)
        try:
            _run("ip", "netns", "add", self._space("hub"))
            _run("ip", "-n", self._space("hub"), "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._space("hub"), "link", "set", "bridge", "up")
            for rank in range(self.ranks):
                self._join(rank)
            self.set_rate(self.rate)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End what still runs and remove the network."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._remove()
        atexit.unregister(self._remove)

    def _space(self, what: str | int) -> str:
        return f"{self.name}-{what}"

    def _join(self, rank: int) -> None:
        space, hub, port = self._space(rank), self._space("hub"), f"port{rank}"
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", hub)
        _run("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")

    def set_rate(self, rate: str, ranks: list[int] | None = None) -> None:
        """Change the rate of links while they run.

        Args:
            rate: Such as ``20mbit``.
            ranks: Whose links; None takes all.
        """
        self.rate = check_rate(rate)
        for rank in range(self.ranks) if ranks is None else ranks:
            for space, device in ((self._space(rank), "eth0"), (self._space("hub"), f"port{rank}")):
                shape = ("rate", rate, "burst", self.burst, "latency", "50ms")
                _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def cut(self, rank: int) -> None:
        """Let nothing through a rank's link."""
        _run("ip", "-n", self._space("hub"), "link", "set", f"port{rank}", "down")

    def restore(self, rank: int) -> None:
        """Let a cut link work again."""
        _run("ip", "-n", self._space("hub"), "link", "set", f"port{rank}", "up")

    def sent_bytes(self, rank: int) -> int:
        """Return the bytes that a rank has sent over its link, headers included."""
        shown = _run("ip", "-n", self._space(rank), "-s", "-j", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def environment(self, rank: int, port: int = 29511) -> dict[str, str]:
        """Return the variables by which ranks of ``Trainer(num_nodes=ranks, devices=1)`` find each other and share the cores."""
        return {
            **os.environ,
            **threads_each(self.ranks),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": str(rank),
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def start(
        self, rank: int, command: list[str], *, folder: Path | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a process in a rank's namespace.

        Args:
            rank: Which.
            command: The process.
            folder: Where it runs.
            log: File for what it prints; None discards it.
        """
        output = open(log, "w") if log else subprocess.DEVNULL  # noqa: SIM115  (the process keeps it)
        try:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._space(rank), *command],
                cwd=folder,
                env=self.environment(rank),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            if log:
                output.close()  # type: ignore[union-attr]
        self._processes.append(process)
        return process

    @contextmanager
    def changing(self, act: Callable[["NetLab", int], None], seconds: float) -> Iterator[None]:
        """Call a function of the lab and a counter every so many seconds while the block runs."""
        stop, failed = threading.Event(), list[Exception]()

        def repeat() -> None:
            turn = 0
            while not stop.wait(seconds):
                turn += 1
                try:
                    act(self, turn)
                except Exception as error:  # raised below: what is measured from now on is of another link
                    failed.append(error)
                    return

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]

    def _remove(self) -> None:
        _remove_spaces(self.name)


def check_rate(rate: str) -> str:
    """Return a rate that ``tc`` understands.

    Raises:
        InputError: If it is none.
    """
    if not _RATE.match(rate):
        raise InputError(f"rate={rate!r} is no rate of a link. Legal: a number with kbit, mbit or gbit, such as 100mbit.")
    return rate


def remove_left_overs() -> None:
    """Remove the networks of labs whose process is gone."""
    for name in _spaces():
        found = re.match(rf"{_PREFIX}(\d+)-", name)
        if found and not Path("/proc", found[1]).exists():
            _remove_spaces(f"{_PREFIX}{found[1]}")


def _spaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def _remove_spaces(lab: str) -> None:
    for name in _spaces():
        if name.startswith(f"{lab}-"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
