"""The one kind of error that is the user's to mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the parameter, its value, what is legal and what to do.

    The command line prints it without a traceback.
    """


def nearest(name: str, legal: Iterable[str]) -> str:
    """Return the end of an error message: the legal names closest to ``name`` first, then the rest."""
    names = list(legal)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{hint} Legal: {', '.join(names)}."
