"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with run folders and checkpoints that are not confused."""

import importlib
import io
import logging
import os
import pickle
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# Imported so that a bare class name is enough on the command line and in configs.
from .. import callbacks, datamodules, modules  # noqa: F401
from ..datamodules.base import data_hashes
from ..errors import InputError
from ..files import write_atomic, write_json
from ..modules.precision import meant_for
from ..process_group import leave_group_at_exit
from .configs import resolve_config
from .environment import environment
from .main import COMMANDS
from .parsing import BriefErrors
from .runs import DEFAULTS, flag_values, holds_run, new_run_name, resolve_last
from .trainer import AutoPrecisionTrainer

# A resumed run may differ in these: they change how the same numbers are computed, or what is done with them.
_FREE_TO_CHANGE = {"compile", "gradient_checkpointing", "loss_chunk_tokens", "attn_implementation"}
_FREE_TO_CHANGE |= {"generation", "max_new_tokens"}
# And other commands than fit in these.
_OF_TRAINING = {"optimizer", "lr_scheduler", "branch_rate", "combination", "combination_rate", "loss_weights", "period"}
log = logging.getLogger("fulgurite")
_RUN_VARIABLE = "FULGURITE_RUN"  # processes that the launcher starts take the first one's run


class RunRecord(SaveConfigCallback):
    """Writes the resolved config and ``environment.json`` into the run's folder; a continued run gets numbered ones.

    Those of other commands than ``fit`` have the command's name (``config-validate.yaml``), since a training may lie there.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, *, command: list[str]) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.command = command

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files."""
        folder = Path(trainer.default_root_dir)
        kind = "" if self.command[0] == "fit" else f"-{self.command[0]}"
        anew = not kind and not self.config.get("ckpt_path")  # what a start that came to nothing has left is overwritten
        suffixes = chain([kind], (f"{kind}-{number}" for number in count(1)))
        suffix = next(each for each in suffixes if anew or not (folder / f"config{each}.yaml").exists())
        write_atomic(folder / f"config{suffix}.yaml", self.parser.dump(self.config, skip_unset=False))
        record = environment(seed=self.config.get("seed_everything"), data=data_hashes(trainer), command=self.command)
        write_json(folder / f"environment{suffix}.json", record)


def other_parsers() -> dict[str, ArgumentParser]:
    """Return parsers of the commands that the dispatcher answers itself, so that the shell completes them too."""
    parsers = {name: ArgumentParser() for name, (module, _) in COMMANDS.items() if module != "cli"}
    parsers["configs"].add_argument("--copy", help="Name of a config and a folder.")
    parsers["labels"].add_argument(
        "action",
        choices=["stats", "verify", "align", "export", "import"],
        help="What to do with the store, or with two tokenizers.",
    )
    parsers["owner"].add_argument("action", choices=["serve", "certificates", "fetch", "demo", "federate"], help="What to do.")
    for name in ("generate", "evaluate", "benchmark", "report", "sweep", "demo"):
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        parsers[name].add_function_arguments(getattr(module, name))
    parsers["report"].add_argument("--write", action="store_true", help="Fill the tables of the documents.")
    return parsers


class _Parser(BriefErrors, LightningArgumentParser):
    """LightningCLI's parser with brief errors."""


class FulguriteCLI(LightningCLI):
    """LightningCLI with one folder a run: ``<runs_folder>/<experiment>/<run>``."""

    completing = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.asked = next(iter(settings.get("args") or [""]))
        super().__init__(*args, **settings)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one that is asked for, or all where that is none: each takes a tenth of a second to build."""
        every = LightningCLI.subcommands()
        return {self.asked: every[self.asked]} if self.asked in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that name the run's folder."""
        parser.add_argument("--runs_folder", default=DEFAULTS["runs_folder"], help="Folder of all runs.")
        parser.add_argument("--experiment", default=DEFAULTS["experiment"], help="Folder of this kind of run, in runs_folder.")
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run; null takes the time.")
        parser.add_argument("--dry_run", type=bool, default=False, help="Only say what memory and time a fit would need.")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            # All predictions of a long capture would not fit into memory; writers store them batch by batch.
            parser.set_defaults({"return_predictions": False})
        return parser

    def before_instantiate_classes(self) -> None:
        """Count tokens in every run."""
        self.token_rate = callbacks.TokenRate()

    def _parse_ckpt_path(self) -> None:
        """Refuse a command line that contradicts the checkpoint; LightningCLI would silently follow the checkpoint."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if not path:
            return
        if path in ("last", "best", "hpc", "registry"):
            raise InputError(f"ckpt_path: {path}: legal in a config is a file, and on the command line --ckpt_path last.")
        if not Path(path).is_file():
            raise InputError(f"--ckpt_path {path!r} is no file. Legal: last, or a checkpoint file.")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"--ckpt_path {path!r} is damaged or no checkpoint of this suite ({error!r}).") from error
        parser = self._parser(self.config.subcommand)
        given = yaml.safe_load(parser.dump(config, skip_unset=False))["model"]
        differences = []
        if saved.get("_class_path", given["class_path"]) != given["class_path"]:
            differences.append(f"model is {saved['_class_path']} there, {given['class_path']} here")
        free = _FREE_TO_CHANGE | (set() if self.config.subcommand == "fit" else _OF_TRAINING)
        for name, value in given.get("init_args", {}).items():
            if name in saved and name not in free and saved[name] != value:
                differences.append(f"model.{name} is {saved[name]!r} there, {value!r} here")
        if differences:
            raise InputError(
                f"The command line contradicts the checkpoint {path}: {'; '.join(differences)}. Give the checkpoint's values "
                "(leave out -c to take its run's config), or start a new run without --ckpt_path."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, with the run's folder and TensorBoard unless the config names a logger."""
        config = self.config[self.config.subcommand]
        if config.get("dry_run"):
            return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        folder = Path(config["runs_folder"]) / config["experiment"]
        name = config.get("run") or _shared_run_name(folder)
        folder /= name
        config["run"] = name
        kwargs["default_root_dir"] = str(folder)
        settings = self._get(self.config_init, "trainer", default={})
        if settings.get("logger") in (None, True) and not settings.get("fast_dev_run"):
            kwargs["logger"] = TensorBoardLogger(str(folder), name="", version="")
        if self.subcommand == "fit" and not config.get("ckpt_path") and _begins_run() and holds_run(folder):
            further = "Go on with it by --ckpt_path last, or give" if list(folder.glob("checkpoints/*.ckpt")) else "Give"
            raise InputError(f"--run {name!r}: {folder} holds a run already and is left as it is. {further} another name.")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"trainer: {str(error).strip().splitlines()[0]}") from error
        shown = callbacks.TrainProgress()
        trainer.callbacks = [  # type: ignore[attr-defined]
            self.token_rate,
            *(shown if type(each) is RichProgressBar else each for each in trainer.callbacks),  # type: ignore[attr-defined]
        ]
        return trainer

    def instantiate_classes(self) -> None:
        """Instantiate everything; what our classes say of bad input is not wrapped into the parser's own words."""
        try:
            with self._meant():
                super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise cause from None

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        if self.completing and parser._subcommands_action is not None:
            for name, other in other_parsers().items():
                parser._subcommands_action.add_subcommand(name, other, help=COMMANDS[name][1])

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.config[subcommand].get("dry_run"):
            super()._run_subcommand(subcommand)
            return
        if subcommand != "fit":
            raise InputError(f"--dry_run is for fit, not for {subcommand}. Leave it out.")
        from .estimate import show  # nothing else begins with it

        with self._meant():
            self.needs = show(self.model, self.datamodule, self.config[subcommand]["trainer"])

    def _meant(self) -> AbstractContextManager[None]:
        """Return within what a run is made: one that is only estimated may be for a GPU that is not here."""
        config = self.config[self.config.subcommand]
        on_gpu = config.get("dry_run") and config["trainer"].get("accelerator") in ("gpu", "cuda")
        return meant_for("cuda") if on_gpu else nullcontext()

    def before_predict(self) -> None:
        """See to it that what is predicted goes somewhere."""
        if any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        if isinstance(self.model, modules.SoftLabelTeacher):
            raise InputError(
                "SoftLabelTeacher predicts labels that nothing would store: add SoftLabelWriter to trainer.callbacks."
            )
        self.trainer.callbacks.append(callbacks.TextWriter())  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Say what came out and where it is."""
        figures = {name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val_")}
        if self.trainer.is_global_zero:
            log.info("Run folder: %s", self.trainer.default_root_dir)
            log.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items())))


def _shared_run_name(folder: Path) -> str:
    """Return the time as the name of a run in a folder, the same in every process of the run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _RUN_VARIABLE not in os.environ:
        # Started by torchrun or a cluster: every process would read its own clock.
        job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
        if job in (None, "none"):
            raise InputError("--run is missing: processes started from outside need one name for their common folder.")
        return str(job)
    return os.environ.setdefault(_RUN_VARIABLE, new_run_name(folder))


def _begins_run() -> bool:
    """Return whether this process is the first of a run that begins; the others may find what that one has written since."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return False
    # torchrun orders the machines in its own way, whatever the cluster says that started it.
    names = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return not any(int(os.environ.get(name, "0")) for name in names)


def _resolved(words: list[str]) -> list[str]:
    """Return words with the names of packaged configs replaced by their files."""
    words = list(words)
    for place, name in flag_values(words, "-c", "--config"):
        path = resolve_config(name)
        if "=" in words[place]:
            words[place] = f"--config={path}"
        else:
            words[place + 1] = path
    return words


def run(words: list[str], *, callbacks: list[Callback] | None = None) -> FulguriteCLI:
    """Run a command in this process; a command may be run after another.

    Args:
        words: ``fit``, ``validate``, ``test`` or ``predict`` with its options.
        callbacks: More callbacks for the Trainer; they are not part of the run's config.

    Returns:
        The command line's object, with its trainer, model and data.

    Raises:
        InputError: If a config, run or checkpoint is not there or contradicts the command line.
    """
    words = resolve_last(_resolved(words))
    leave_group_at_exit()
    set_parsing_settings(add_print_completion_argument=True, docstring_parse_attribute_docstrings=True)
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(_RUN_VARIABLE, None)  # of a run before this one
    FulguriteCLI.completing = words[0].startswith("--print_completion")
    return FulguriteCLI(
        parser_class=_Parser,
        parser_kwargs={"prog": "fulgurite"},
        trainer_class=AutoPrecisionTrainer,
        save_config_callback=RunRecord,
        save_config_kwargs={"command": words},
        trainer_defaults={"callbacks": callbacks or []},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=words,
    )


class _ParsedOnly(FulguriteCLI):
    """The command line up to the parsed settings: nothing is made, nothing runs."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(words: list[str]) -> Namespace:
    """Return the settings that the words of a command line mean, defaults included.

    Args:
        words: ``fit``, ``validate``, ``test`` or ``predict`` with its options.

    Raises:
        InputError: If the command line would not take them.
    """
    with redirect_stderr(io.StringIO()) as said:
        try:
            cli = _ParsedOnly(
                parser_class=_Parser,
                parser_kwargs={"prog": "fulgurite"},
                trainer_class=AutoPrecisionTrainer,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                args=_resolved(words),
            )
        except SystemExit:
            raise InputError(said.getvalue().partition(": ")[2].partition("\nAll options")[0]) from None
    return cli.config[words[0]]


def quiet() -> None:
    """Show our own messages, and leave out advertisements and warnings that no user can act on."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: "Tip:" not in record.getMessage())
    unwanted = ("LeafSpec", "does not have many workers", "not supported by the model summary", "across ranks is zero")
    for message in (*unwanted, "LightningCLI's args parameter", "Found . module.s. in eval mode"):
        warnings.filterwarnings("ignore", message=f".*{message}")


def main(words: list[str]) -> None:
    """Run a command of the shell."""
    quiet()
    # sys.argv stays as it is: the launcher starts the other ranks with it.
    run(words)
