"""The ``fulgurite`` command: answers the small questions at once, and imports a command's code only when it is called."""

import errno
import importlib
import os
import sys

from .. import __version__
from ..errors import InputError, RankLost, exit_code, nearest

# command: (module of this package with ``main(arguments)``, what it does)
COMMANDS = {
    "fit": ("cli", "train a model"),
    "validate": ("cli", "figures of a model on validation data"),
    "test": ("cli", "figures of a model on test data"),
    "predict": ("cli", "write text, or capture a teacher's soft labels"),
    "configs": ("configs", "list the packaged configs, or copy one to edit"),
    "generate": ("evaluation.generate", "text, code, a translation or a class from a model"),
    "owner": ("offsite.owner", "the service of a model's owner to parties that tune it, certificates, download, a trial"),
    "labels": ("labels", "statistics, verification, export and import of soft-label stores; alignment of vocabularies"),
    "sweep": ("sweep", "a search over settings, by Optuna"),
    "evaluate": ("evaluation.evaluate", "downstream tasks of a model, by lm-eval"),
    "benchmark": ("benchmarks.command", "a grid of variants and seeds; one result file a cell"),
    "report": ("benchmarks.report", "tables and plots from result files"),
    "demo": ("demo", "distil a small model from stored soft labels, in a quarter of an hour"),
}


def usage() -> str:
    """Return the text of ``fulgurite --help``."""
    rows = "\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: fulgurite COMMAND [OPTIONS]\n\n"
        "Makes language models smaller and cheaper to train.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  --help    this text; `fulgurite COMMAND --help` for a command's options\n"
        "  --version\n"
        "  --print_completion shtab-{bash,zsh,fish,tcsh}  a script that completes commands and options\n\n"
        "examples:\n"
        "  fulgurite configs\n"
        "  fulgurite fit -c distillation/student --data.store runs/labels\n"
        "  fulgurite generate --model runs/demo/export --prompt 'def read_file('\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The words behind ``fulgurite``; None takes those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if words[0] == "--version":
        print(f"fulgurite {__version__}")
        return
    try:
        _dispatch(words)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(f"fulgurite {words[0]}: the disk is full{place}. Free some space and run the same command again.", file=sys.stderr)
        sys.exit(2)
    except InputError as error:
        if os.environ.get("FULGURITE_TRACEBACK"):
            raise
        print(f"fulgurite {words[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        sys.exit(exit_code(error))
    except RankLost as error:
        print(f"fulgurite {words[0]}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a process group with a lost rank may not end by itself


def _dispatch(words: list[str]) -> None:
    command, rest = words[0], words[1:]
    if command.startswith("--print_completion"):
        command, rest = "fit", words  # LightningCLI's parser knows all options
    elif command not in COMMANDS:
        raise InputError(f"{command!r} is no command.{nearest(command, COMMANDS)}")
    module = importlib.import_module(f".{COMMANDS[command][0]}", __package__)
    module.main(words if COMMANDS[command][0] == "cli" else rest)
