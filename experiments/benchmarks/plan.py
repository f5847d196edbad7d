"""A benchmark's YAML, and the jobs that it asks for. Imports nothing heavy.

A *variant* is what a user can run with ``fit``: a config's name and overrides. With a seed it is a *cell*, which ends in one
result file. A *product* (an adapted teacher, a label store) is made once and used by the cells that name it in braces.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ...errors import InputError, nearest
from ..configs import data_folder, resolve_config
from .fingerprints import code_version, content_hash, exists
from .schema import SCHEMA

EXPERIMENTS = Path(__file__).parent.parent
SMOKE = "smoke"  # the scale whose results are thrown away
_PLACE = re.compile(r"\{([\w.-]+)\}")


@dataclass
class Step:
    """One command of a job.

    Args:
        name: Name of its folder inside the job's.
        command: Command of ``fulgurite``, or ``measure`` for a function of this package.
        config: Packaged config, where the command takes one.
        function: ``module:function`` under ``fulgurite.experiments``, for ``measure``; it returns the metrics.
        settings: Overrides by dotted key; products and folders stand in braces.
        metrics: {name in the result: name that the command gives}; None keeps all that ``measure`` gives.
        curves: Logged scalars that are kept for every step.
        reads: Files and folders of data that it reads without being told their names.
    """

    name: str
    command: str
    config: str | None
    function: str | None
    settings: dict[str, Any]
    metrics: dict[str, str] | None
    curves: list[str]
    reads: list[str]

    def words(self) -> list[str]:
        """Return the words of the command line, places still in braces."""
        words = [self.command]
        words += ["-c", self.config] if self.config else []
        words += [self.function] if self.function else []
        return words + [f"--{key}={_word(value)}" for key, value in self.settings.items()]


@dataclass
class Job:
    """A product or a cell.

    Args:
        name: Its name: a product's (``<product>@<seed>`` where each seed has its own), or ``<variant>-<seed>``.
        steps: What is run, in order.
        needs: Names of the products' jobs that it uses.
        fingerprint: Hash of what it depends on: commands, configs, code, data, and the fingerprints of its products.
        variant: The variant of a cell; None for a product.
        title: The variant's row in tables.
        seed: The seed.
        place: What stands in braces for a product.
        gives: What a product gives, as a path in its first step's folder.
        disk: Product whose bytes on disk count as the cell's.
        data: Hashes of the data that it and its products depend on, by their names.
    """

    name: str
    steps: list[Step]
    needs: list[str]
    fingerprint: str = ""
    variant: str | None = None
    title: str = ""
    seed: int = 0
    place: str = ""
    gives: str = ""
    disk: str | None = None
    data: dict[str, str] = field(default_factory=dict)


@dataclass
class Benchmark:
    """A benchmark's YAML at one scale.

    Args:
        name: ``distillation`` or ``distillation/speed``.
        scale: Name of the scale.
        spec: The YAML's content.
        constants: Settings of the scale that stand in braces elsewhere; ``data`` among them.
        file: The YAML, where it is the user's own.
    """

    name: str
    scale: str
    spec: dict[str, Any]
    constants: dict[str, str] = field(default_factory=dict)
    file: Path | None = None

    @property
    def results(self) -> Path:
        """Folder of the results of this scale: the committed ones, or beside the user's own YAML."""
        if self.file is not None:
            return self.file.parent / f"{self.file.stem}-results" / self.scale
        method, _, part = self.name.partition("/")
        return EXPERIMENTS.joinpath(method, "results", *([part] if part else []), self.scale)

    @property
    def note(self) -> str:
        """What stands under the table."""
        return self.fill_note(self.spec["note"])

    def fill_note(self, note: str) -> str:
        """Return a note with the scale's settings in place of their names."""
        shown = {name: f"{int(value):,}" if str(value).isdigit() else value for name, value in self.constants.items()}
        return fill(note, {name: value.removeprefix("{data}/") for name, value in shown.items()}, "note").strip()

    def cells(self, seeds: list[int] | None = None, only: list[str] | None = None) -> list[Job]:
        """Return the cells, without their fingerprints; reads no data.

        Args:
            seeds: Seeds for every variant; None takes the benchmark's.
            only: Keep the cells whose name or variant is one of these or matches one as a pattern (``fixed-*``).

        Raises:
            InputError: If a pattern matches no cell, or a name in braces is unknown.
        """
        cells = [
            self._cell(variant, entry, seed)
            for variant, entry in self.spec["variants"].items()
            for seed in seeds or entry.get("seeds") or self.spec.get("seeds", [0])
        ]
        return _matching(cells, only) if only else cells

    def jobs(self, seeds: list[int] | None = None, only: list[str] | None = None) -> list[Job]:
        """Return the products that are needed and the cells, each after what it needs.

        Args:
            seeds: As for ``cells``.
            only: As for ``cells``.

        Raises:
            InputError: As for ``cells``; and if data is not there, or products need each other.
        """
        cells = self.cells(seeds, only)
        order: dict[str, Job] = {}
        for cell in cells:
            self._collect(cell, order, [])
        return [*order.values(), *cells]

    def _collect(self, job: Job, order: dict[str, Job], above: list[str]) -> None:
        """Add what a job needs, and fill in its fingerprint."""
        if job.name in above:
            raise InputError(f"products of benchmark {self.name!r} need each other: {' -> '.join([*above, job.name])}.")
        for name in job.needs:
            if name not in order:
                product = self._product(name.partition("@")[0], job.seed)
                self._collect(product, order, [*above, job.name])
                order[name] = product
        data = self._data_hashes(job)
        job.data = {key: value for name in job.needs for key, value in order[name].data.items()} | data
        content = {
            "steps": [[step.words(), sorted((step.metrics or {}).items()), step.curves] for step in job.steps],
            "kept": [job.disk, job.gives],
            "seed": job.seed,
            "configs": [Path(resolve_config(step.config)).read_text("utf-8") for step in job.steps if step.config],
            "data": data,
            "products": [order[name].fingerprint for name in job.needs],
            "code": code_version(),
        }
        if self.file is not None:  # methods of the user's own lie beside it
            content["own"] = {path.name: content_hash(path) for path in sorted(self.file.parent.glob("*.py"))}
        job.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _data_hashes(self, job: Job) -> dict[str, str]:
        words = " ".join(word for step in job.steps for word in step.words())
        hashes = {}
        for name, value in self.constants.items():
            if value not in words:
                continue
            if value.startswith("{data}/") or exists(Path(value)):  # else a number, or a source that is no file
                hashes[value] = self._data_hash(name, value, f", or your own with --set.{name}")
        for value in (value for step in job.steps for value in step.reads):
            hashes[value] = self._data_hash("reads", value)
        return hashes

    def _data_hash(self, name: str, value: str, remedy: str = "") -> str:
        path = Path(value.replace("{data}", self.constants["data"]))
        if not exists(path):
            raise InputError(
                f"{name}={str(path)!r} of benchmark {self.name!r} is not there. Name the folder of the data with --data{remedy}."
            )
        return content_hash(path)

    def _product(self, name: str, seed: int) -> Job:
        entry = self.spec["products"][name]
        step = self._step(name, entry, {})
        seeded = entry.get("seeded", False)
        if seeded:
            _give_seed(step, seed)
        needs = self._needs([step], seed)
        if not seeded and (other := next((need for need in needs if "@" in need), None)):
            raise InputError(
                f"products.{name} of benchmark {self.name!r} uses {other.partition('@')[0]!r}, of which each seed has its own. "
                "Give it seeded: true, too."
            )
        job_name = self._job_name(name, seed)
        return Job(job_name, [step], needs, seed=seed if seeded else 0, place=name, gives=entry["gives"])

    def _cell(self, variant: str, entry: dict[str, Any], seed: int) -> Job:
        products = self.spec.get("products", {})
        common = self.spec.get("common", {})
        if "function" in entry:
            common = {key: value for key, value in common.items() if key != "config"}
        own = {**common, **entry, "set": {**common.get("set", {}), **entry.get("set", {})}}
        let = {**common.get("let", {}), **entry.get("let", {})}
        evaluations = self.spec.get("evaluations", {})
        where = f"variants.{variant} of benchmark {self.name!r}"
        for name in (chosen := entry.get("evaluations", evaluations)):
            if name not in evaluations:
                raise InputError(f"{where}: {name!r} is no evaluation.{nearest(name, evaluations)}")
        if model := entry.get("model"):  # is there: nothing is trained
            extra = next((key for key in ("command", "config", "function", "set", "reads") if key in entry), None)
            if extra or not chosen:
                raise InputError(f"{where} has a model to evaluate, so it takes evaluations and no {extra or 'training'}.")
            let = {**let, "model": model}
        steps = [] if model else [self._step("train", own, let)]
        for step in steps:
            _give_seed(step, seed)
        for step in [self._step(name, evaluations[name], let) for name in chosen]:
            if step.command == "measure":
                _give_seed(step, seed)
            steps.append(step)
        disk = entry.get("disk")
        if disk is not None and disk not in products:
            raise InputError(
                f"variants.{variant}.disk={disk!r} of benchmark {self.name!r} is no product.{nearest(disk, products)}"
            )
        needs = self._needs(steps, seed, disk)
        return Job(f"{variant}-{seed}", steps, needs, variant=variant, title=entry["title"], seed=seed, disk=disk)

    def _step(self, name: str, entry: dict[str, Any], let: dict[str, Any]) -> Step:
        command = entry.get("command", "fit")
        where = f"benchmark {self.name!r}, {name}"
        places = {key: "{" + key + "}" for key in ("data", "run", "model", *self.spec.get("products", {}))}
        places |= {key: value for key, value in self.constants.items() if key != "data"}
        for key, value in let.items():
            places[key] = fill(str(value), places, f"{where}, let: {key}")
        settings = {
            key: _filled(value, places, f"{where}: {key}")
            for key, value in entry.get("set", {}).items()
            if value is not None  # with null, a variant leaves out a common setting
        }
        if (command == "measure") != ("function" in entry) or (command not in ("measure", "evaluate")) != ("config" in entry):
            raise InputError(
                f"{name} of benchmark {self.name!r} has command={command!r}: measure takes a function (and no config), evaluate "
                "neither, all others a config."
            )
        if "config" in entry:
            resolve_config(entry["config"])
        metrics = None if command == "measure" and "metrics" not in entry else entry.get("metrics", {})
        if metrics is not None:
            metrics = {key: fill(source, places, f"{where}, metrics: {key}") for key, source in metrics.items()}
        paths = {key: places[key] for key in ("data", *self.constants, *let)}  # nothing that is yet to be made
        reads = [fill(path, paths, f"{where}, reads") for path in entry.get("reads", [])]
        return Step(name, command, entry.get("config"), entry.get("function"), settings, metrics, entry.get("curves", []), reads)

    def _needs(self, steps: list[Step], seed: int, disk: str | None = None) -> list[str]:
        """Return the names of the products' jobs that steps name."""
        used = {match for step in steps for word in step.words() for match in _PLACE.findall(word)}
        return [self._job_name(name, seed) for name in self.spec.get("products", {}) if name in used or name == disk]

    def _job_name(self, product: str, seed: int) -> str:
        return f"{product}@{seed}" if self.spec["products"][product].get("seeded") else product


def _give_seed(step: Step, seed: int) -> None:
    if step.command != "evaluate":
        step.settings = {"seed" if step.command == "measure" else "seed_everything": seed, **step.settings}


def available() -> dict[str, Path]:
    """Return the packaged benchmarks by name."""
    found = {path.parent.name: path for path in EXPERIMENTS.glob("*/benchmark.yaml")}
    for path in EXPERIMENTS.glob("*/benchmark-*.yaml"):
        found[f"{path.parent.name}/{path.stem.removeprefix('benchmark-')}"] = path
    return dict(sorted(found.items()))


def load_benchmark(
    name: str, scale: str = "cpu", *, data: str | None = None, settings: dict[str, Any] | None = None
) -> Benchmark:
    """Read a benchmark.

    Args:
        name: Its name, or a YAML file of your own.
        scale: One of its scales.
        data: Folder that ``{data}`` stands for; None takes ``shared/data`` beside the checkout.
        settings: Other values for settings of the scale.

    Raises:
        InputError: If the name, the scale or a setting is unknown, or the YAML has a wrong entry.
    """
    found = available()
    own = Path(name) if name.endswith((".yaml", ".yml")) else None
    if own is None and name not in found:
        raise InputError(f"{name!r} is no benchmark.{nearest(name, found)}")
    if own is not None and not own.is_file():
        raise InputError(f"{name!r} is no file. Legal: a YAML file of your own, or {', '.join(found)}.")
    path = own or found[name]
    name = own.stem if own else name
    try:
        spec = yaml.safe_load(path.read_text("utf-8"))
        jsonschema.validate(spec, SCHEMA)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    except jsonschema.ValidationError as error:
        raise InputError(f"{path}, {error.json_path.removeprefix('$.')}: {error.message}.") from error
    if scale not in spec["scales"]:
        raise InputError(f"--scale {scale!r}: benchmark {name!r} has no such scale. Legal: {', '.join(spec['scales'])}.")
    constants = {key: str(value) for key, value in spec["scales"][scale].items()}
    for key, value in (settings or {}).items():
        if key not in constants:
            raise InputError(f"--set.{key}: scale {scale!r} of benchmark {name!r} has no such setting.{nearest(key, constants)}")
        constants[key] = str(value)
    return Benchmark(name, scale, spec, {**constants, "data": str(data_folder(data))}, own)


def fill(text: str, values: dict[str, str], where: str) -> str:
    """Return a text with its places in braces filled in.

    Args:
        text: The text.
        values: What the places stand for.
        where: What the text is, for the message.

    Raises:
        InputError: If a place stands for nothing.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise InputError(f"{where}: {match[0]} stands for nothing.{nearest(match[1], values)}")
        return str(values[match[1]])

    return _PLACE.sub(replace, text)


def _filled(value: Any, places: dict[str, str], where: str) -> Any:
    """Return a setting with the places in all its texts filled in."""
    if isinstance(value, dict):
        return {key: _filled(item, places, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, places, where) for item in value]
    return fill(value, places, where) if isinstance(value, str) else value


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _matching(cells: list[Job], only: list[str]) -> list[Job]:
    kept = []
    names = {name for cell in cells for name in (cell.name, str(cell.variant))}
    for pattern in only:
        if not pattern or not any(Path(name).match(pattern) for name in names):
            raise InputError(f"--only {pattern!r} matches no variant or cell.{nearest(pattern, names)}")
    for cell in cells:
        if any(Path(name).match(pattern) for name in (cell.name, str(cell.variant)) for pattern in only):
            kept.append(cell)
    return kept


def in_order(jobs: list[Job]) -> Iterator[Job]:
    """Yield jobs so that a cell comes as soon as its products are there."""
    made: set[str] = set()
    products = {job.name: job for job in jobs if job.variant is None}

    def first(job: Job) -> Iterator[Job]:
        for name in job.needs:
            if name not in made:
                yield from first(products[name])
        if job.name not in made:
            made.add(job.name)
            yield job

    for job in jobs:
        if job.variant is not None:
            yield from first(job)
