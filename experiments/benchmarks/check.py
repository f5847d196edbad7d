"""The process that looks at all command lines of a benchmark before the first job runs.

Reads ``{job: [words of a command, ...]}`` from the standard input and prints ``{job: error}`` of those that are wrong.
"""

import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from ...errors import InputError
from ..cli import parse, quiet


def measuring(words: list[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that a ``measure`` step names, and its arguments.

    Args:
        words: ``measure``, ``module:function`` under ``fulgurite.experiments``, and its arguments as options.

    Raises:
        InputError: If there is no such function, or it takes other arguments.
    """
    module, _, name = words[1].partition(":")
    options = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    arguments = {key: _value(text) for key, text in options.items()}
    try:
        function = getattr(importlib.import_module(f"fulgurite.experiments.{module}"), name)
        inspect.signature(function).bind(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"function {words[1]!r}: {error}.") from error
    return function, arguments


def _value(text: str) -> Any:
    """Return what an option's text means: a number, list or mapping, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def wrong(words: list[str]) -> str | None:
    """Return what is wrong with a command line, or None; ``evaluate`` is not looked at, as it needs an extra."""
    try:
        if words[0] == "measure":
            measuring(words)
        elif words[0] != "evaluate":
            parse(words)
    except InputError as error:
        return str(error)
    return None


def main() -> None:
    """Check what stands in the standard input."""
    quiet()
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # each command line would say its seed
    known: dict[str, str | None] = {}
    found = {}
    for job, commands in json.load(sys.stdin).items():
        for words in commands:
            key = json.dumps([word for word in words if not word.startswith(("--seed=", "--seed_everything="))])
            if key not in known:
                known[key] = wrong(words)
            if known[key]:
                found[job] = known[key]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
