"""The process that looks at all command lines of a benchmark before the first job runs.

Reads ``{job: [words of a command, ...]}`` from the standard input and prints ``{job: error}`` of those that are wrong, or that
need what this machine lacks.
"""

import importlib
import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ...errors import InputError
from ...modules.pretrained import PACKAGES, resolve_source
from ..cli import parse, quiet
from ..evaluation.evaluate import check_harness, evaluate
from ..parsing import brief

_PACKAGE = re.compile(r"package:([\w.-]+)")


def measuring(words: list[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that a ``measure`` step names, and its arguments.

    Args:
        words: ``measure``, ``module:function`` under ``fulgurite.experiments``, and its arguments as options.

    Raises:
        InputError: If there is no such function, or it takes other arguments.
    """
    module, _, name = words[1].partition(":")
    try:
        function = getattr(importlib.import_module(f"fulgurite.experiments.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"function {words[1]!r}: {error}.") from error
    _check_options(function, words[2:], f"function {words[1]!r}")
    return function, {key: _value(text) for key, text in _options(words[2:]).items()}


def _check_options(function: Callable[..., Any], words: list[str], where: str) -> None:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    names = parser.add_function_arguments(function, fail_untyped=False)  # with those that it hands on by **
    try:
        parser.parse_args(words)
    except ArgumentError as error:
        raise InputError(f"{where}: {brief(str(error), [f'--{name}' for name in names])}") from error


def _options(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def _value(text: str) -> Any:
    """Return what an option's text means: a number, list or mapping, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def wrong(words: list[str]) -> str | None:
    """Return what is wrong with a command line, or None."""
    try:
        if words[0] == "measure":
            measuring(words)
        elif words[0] == "evaluate":
            _check_options(evaluate, words[1:], "evaluate")
        else:
            parse(words)
    except InputError as error:
        return str(error)
    return None


def missing(words: list[str]) -> str | None:
    """Return what a right command line needs that this machine lacks, or None."""
    try:
        for name in _PACKAGE.findall(" ".join(words)):
            if name in PACKAGES:  # a model's; others are texts
                resolve_source(f"package:{name}")
        if words[0] == "evaluate":
            check_harness(_options(words[1:])["tasks"])
    except InputError as error:
        return str(error)
    if words[0] == "measure":
        function, arguments = measuring(words)
        lacking = getattr(function, "what_is_missing", lambda arguments: None)(arguments)
        if lacking:
            return f"function {words[1]!r} {lacking}. Name other cells with --only."
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
                known[key] = wrong(words) or missing(words)
            if known[key]:
                found[job] = known[key]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
