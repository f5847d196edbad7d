"""The errors that the command line prints without a traceback."""

import difflib
import signal
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the parameter, its value, what is legal and what to do.

    The command line prints it without a traceback.
    """


class RankLost(RuntimeError):
    """Another process of a distributed run is gone: the message says so, and how to go on."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """Return the end of an error message: the legal names closest to ``name`` first, then the rest."""
    names = list(legal)
    single = [one for one in names if " " not in one]  # the others describe what is legal
    close = difflib.get_close_matches(name, single, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{hint} Legal: {', '.join(names)}."


def exit_code(error: SystemExit) -> int | str | None:
    """Return the code to end with: Lightning's exception for SIGTERM has none, which would say that all went well."""
    return 128 + signal.SIGTERM if error.code is None and type(error) is not SystemExit else error.code
