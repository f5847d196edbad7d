"""Parsers that say what is wrong with a command line in one sentence, in place of the whole usage."""

import os
import re
import sys
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..errors import nearest


class BriefErrors:
    """What a parser says of wrong options: one sentence, and where help is."""

    def error(self: Any, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and end with status 2; with ``FULGURITE_TRACEBACK``, as jsonargparse does."""
        if os.environ.get("FULGURITE_TRACEBACK") or not self.exit_on_error:  # parsers of nested settings do not exit
            super().error(message, ex)  # type: ignore[misc]
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{prog}: {brief(message, _options(self))}\nAll options: {prog} --help\n")
        sys.exit(2)


class Parser(BriefErrors, ArgumentParser):
    """jsonargparse's parser with brief errors."""


def brief(message: str, options: list[str]) -> str:
    """Return the one sentence that counts of what jsonargparse says.

    Args:
        message: What it says, perhaps over many nested lines.
        options: What the parser knows, to find the one that was meant.
    """
    option = "--" + ".".join(re.findall(r'Parser key "([^"]+)"', message))
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        owner = re.findall(r"given class_path '([^']+)'", message)[-1]
        return f"{option} ({owner.rpartition('.')[2]}) has no setting {unknown[1]!r}.{nearest(unknown[1], _settings(owner))}"
    wanted = [pair for pair in re.findall(r"Expected an? (.+)\. Got value: (.*)", message) if "NoneType" not in pair[0]]
    if wanted:
        kind, value = wanted[-1]
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", kind)
        words = " Put quotes around yes, no, on and off: YAML reads them as true and false."
        return f"{option}={value}: expected {kind}.{words if value in ('True', 'False') else ''}"
    path = re.search(r"Expected a dot import path string: (.+)", message)
    if path:
        return f"{option}={path[1]}: no such class.{_meant(path[1])} Legal: a class of Fulgurite or Lightning, or a dotted path."
    strange = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
    if strange:
        return f"{strange[1]} is no option.{nearest(strange[1], options).partition(' Legal:')[0]}"
    return message


def _meant(name: str) -> str:
    packages = (import_module(f"..{package}", __package__) for package in ("modules", "datamodules", "callbacks"))
    return nearest(name, [public for package in packages for public in package.__all__]).partition(" Legal:")[0]


def _settings(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return [key for key in signature(getattr(import_module(module), name)).parameters if key != "self"]


def _options(parser: Any) -> list[str]:
    """Return the options of a parser and of those of its commands."""
    found = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    commands = parser._subcommands_action
    return found + [flag for one in (commands.choices.values() if commands else ()) for flag in _options(one)]
