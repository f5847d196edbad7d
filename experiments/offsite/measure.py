"""The rungs of the ladder from no tuning to tuning of the whole model, for ``benchmark offsite``."""

import json
import logging
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from ...callbacks import TokenRate
from ...datamodules import PartyDataModule
from ...errors import InputError, nearest
from ...files import cache_folder, digest, write_json
from ...modules import OffsitePrefixTuning, WarmupCosine
from ...modules.offsite import EmulatorManifest, ModelPart, Prefix, PrefixSettings
from ...modules.offsite.averaging import average_prefixes
from ...modules.offsite.owner import OwnerLayers
from ...modules.offsite.prefix import Kind, LayerMap
from ...modules.offsite.remote import LocalOwner
from ...modules.precision import Dtype, compute_device
from ...modules.pretrained import load_model
from ..benchmarks.fingerprints import code_version
from ..measuring import made_once
from .baselines import PeftTuning
from .tasks import CANDIDATES

log = logging.getLogger(__name__)
RUNGS = (
    "zero",
    "emulator-zero",
    "emulator",
    "plug-in",
    "split",
    "federated",
    "central",
    "peft-prefix",
    "peft-text-prefix",
    "lora",
)
_PEFT: dict[str, Literal["lora", "prefix", "text-prefix"]] = {
    "peft-prefix": "prefix",
    "peft-text-prefix": "text-prefix",
    "lora": "lora",
}


class Ladder:
    """What all rungs share: models, data, and how a prefix is trained and measured.

    Args:
        full: Source of the owner's model.
        emulator: Folder of its emulator.
        task: Name of the task.
        rows: Folder of ``write_task``.
        prefix: Kind and length of the prefix.
        batch_size: Examples a step.
        weights: Type of the models' weights.
        seed: Of everything.
    """

    def __init__(
        self,
        full: str,
        emulator: str,
        task: str,
        rows: str,
        prefix: PrefixSettings,
        batch_size: int,
        weights: Dtype,
        seed: int,
    ) -> None:
        self.full, self.emulator, self.prefix, self.seed = full, emulator, prefix, seed
        self.common: dict[str, Any] = {"candidates": CANDIDATES[task], "weights": weights}
        files: dict[str, Any] = {"train": str(Path(rows) / "train.jsonl"), "val": str(Path(rows) / "test.jsonl")}
        self.data = partial(PartyDataModule, **files, chat=False, batch_size=batch_size, max_length=512)
        self.tokens = 0

    def rows(self, **data: Any) -> int:
        """Return how many rows there are to train on."""
        found = self.data(**data, tokenizer=self.full)
        found.setup("fit")
        assert found.train_set is not None
        return len(found.train_set)  # type: ignore[arg-type]

    def fit(self, module: LightningModule, steps: int, phase: int = 0, **data: Any) -> LightningModule:
        """Train for some steps; rows come in another order in each phase."""
        rate = TokenRate()
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
        }
        trainer = Trainer(max_steps=steps, max_epochs=-1, precision="32-true", gradient_clip_val=1.0, callbacks=[rate], **quiet)
        trainer.fit(module, self.data(**data, seed=100 * self.seed + phase))
        self.tokens += rate.tokens
        return module

    def score(self, module: LightningModule) -> dict[str, float]:
        """Return accuracy and loss on the test rows."""
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, precision="32-true")
        found = trainer.validate(module, self.data(), verbose=False)[0]
        return {"accuracy": found["val_accuracy"], "loss": found["val_loss"], "tokens": float(self.tokens)}

    def tuning(self, source: str, rate: float, **settings: Any) -> OffsitePrefixTuning:
        """Return a module that trains a prefix."""
        seed_everything(self.seed, verbose=False)
        optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
        return OffsitePrefixTuning(
            source, prefix=self.prefix, optimizer=optimizer, lr_scheduler=WarmupCosine, **self.common, **settings
        )

    def plugged(self, source: str, start: Path | None = None, layer_map: LayerMap = "kept") -> OffsitePrefixTuning:
        """Return a module that measures a prefix, or the model without one."""
        place = None if start is None else str(start)
        return OffsitePrefixTuning(source, phase="plug_in", prefix=None, start=place, layer_map=layer_map, **self.common)

    def on_emulator(self, steps: int, rate: float, **data: Any) -> Path:
        """Return the folder of a prefix tuned on the emulator; the same one is tuned once."""
        key = [
            self.emulator,
            str(self.data.keywords),
            self.common,
            str(self.prefix),
            steps,
            rate,
            self.seed,
            data,
            code_version(),
        ]
        weights = EmulatorManifest.load(Path(self.emulator)).files
        before = self.tokens

        def make(folder: Path) -> None:
            module = self.fit(self.tuning(self.emulator, rate), steps, **data)
            assert isinstance(module, OffsitePrefixTuning)
            module.save_prefix(folder / "prefix")
            write_json(folder / "cost.json", {"tokens": self.tokens - before})

        folder = made_once(cache_folder("offsite", digest([key, weights])), make)
        self.tokens = before + json.loads((folder / "cost.json").read_text("utf-8"))["tokens"]
        return folder / "prefix"

    def split(
        self, start: Path, steps: int, rate: float, layer_map: LayerMap, phase: int = 1, **data: Any
    ) -> OffsitePrefixTuning:
        """Go on with a prefix through the owner's layers, which stand in this process; a test holds that they are the same."""
        module = self.tuning(self.emulator, rate, phase="split", start=str(start), layer_map=layer_map)
        manifest = EmulatorManifest.load(Path(self.emulator))
        whole = load_model(self.full, self.common["weights"])
        part = ModelPart(whole, manifest.identical, manifest.layers).to(compute_device())
        module.owner = LocalOwner(OwnerLayers(part, most_graphs=1))
        module.cut = manifest.identical
        found = self.fit(module, steps, phase, **data)
        assert isinstance(found, OffsitePrefixTuning)
        return found


def rung(
    *,
    seed: int,
    kind: str,
    task: str,
    full: str,
    emulator: str,
    rows: str,
    prefix: Kind,
    length: int,
    batch_size: int,
    tune_steps: int,
    split_steps: int,
    tune_rate: float,
    split_rate: float,
    layer_map: LayerMap = "kept",
    parties: int = 2,
    alpha: float | None = None,
    split_seed: int = 0,
    rounds: int = 2,
    weights: Dtype = "bfloat16",
) -> dict[str, float]:
    """Return accuracy and loss on a task's test rows of one rung.

    Args:
        seed: Of the prefix and the order of rows.
        kind: One of ``RUNGS``.
        task: ``sst2`` or ``ag_news``.
        full: Source of the owner's model.
        emulator: Folder of its emulator.
        rows: Folder of ``write_task``.
        prefix: ``prompts`` or ``key_values``; PEFT's has keys and values in any case.
        length: Of the prefix.
        batch_size: Examples a step.
        tune_steps: Optimizer steps on the emulator.
        split_steps: Optimizer steps through the split.
        tune_rate: Learning rate of the former, and of rungs that train the whole model.
        split_rate: Of the latter.
        layer_map: How an emulator's prefix is carried over.
        parties: Of ``federated``.
        alpha: Of ``federated``: unlike parties; None for alike ones.
        split_seed: Of ``federated``: of the rows' split among the parties.
        rounds: Of ``federated``: how often prefixes are averaged in the split phase.
        weights: Type of the models' weights; prefixes have float32.

    Raises:
        InputError: If the kind is unknown.
    """
    if kind not in RUNGS:
        raise InputError(f"kind={kind!r} is no rung.{nearest(kind, RUNGS)}")
    ladder = Ladder(full, emulator, task, rows, PrefixSettings(prefix, length), batch_size, weights, seed)
    if kind in ("zero", "emulator-zero"):
        return ladder.score(ladder.plugged(full if kind == "zero" else emulator))
    if kind == "central":
        return ladder.score(ladder.fit(ladder.tuning(full, tune_rate), tune_steps + split_steps))
    if kind in _PEFT:
        seed_everything(seed, verbose=False)
        optimizer = partial(torch.optim.AdamW, lr=tune_rate, weight_decay=0.0)
        module = PeftTuning(full, _PEFT[kind], length, seed=seed, optimizer=optimizer, lr_scheduler=WarmupCosine, **ladder.common)
        return ladder.score(ladder.fit(module, tune_steps + split_steps))
    if kind == "federated":
        shares = [{"party": party, "parties": parties, "alpha": alpha, "split_seed": split_seed} for party in range(parties)]
        return _federated(ladder, shares, rounds, tune_steps, split_steps, tune_rate, split_rate, layer_map)
    start = ladder.on_emulator(tune_steps, tune_rate)
    if kind == "emulator":
        return ladder.score(ladder.plugged(emulator, start))
    if kind == "plug-in":
        return ladder.score(ladder.plugged(full, start, layer_map))
    return ladder.score(ladder.split(start, split_steps, split_rate, layer_map))


def _federated(
    ladder: Ladder,
    shares: list[dict[str, Any]],
    rounds: int,
    tune_steps: int,
    split_steps: int,
    tune_rate: float,
    split_rate: float,
    layer_map: LayerMap,
) -> dict[str, float]:
    """Each party tunes on the emulator with its rows; their prefixes are averaged then, and after each round in the split.

    A party takes its rows' share of the steps, so that all of them together take as many as one that has all rows.
    """
    manifest = EmulatorManifest.load(Path(ladder.emulator))
    rows = [ladder.rows(**share) for share in shares]

    def steps_of(steps: int) -> list[int]:
        return [max(1, round(steps * own / sum(rows))) for own in rows]

    folders = [ladder.on_emulator(steps, tune_rate, **share) for steps, share in zip(steps_of(tune_steps), shares)]
    mean = average_prefixes([Prefix.load(folder, manifest.model, layer_map) for folder in folders], steps_of(tune_steps))
    with TemporaryDirectory() as work:
        start = Path(work) / "prefix"
        mean.save(start, manifest.model)
        for turn in range(rounds):
            local = steps_of((turn + 1) * split_steps // rounds - turn * split_steps // rounds)
            found = [
                ladder.split(start, steps, split_rate, layer_map, 1 + turn, **share).prefix for steps, share in zip(local, shares)
            ]
            mean = average_prefixes([prefix for prefix in found if prefix is not None], local)
            mean.save(start, manifest.model)
            log.info("Round %d of %d is averaged", turn + 1, rounds)
        return ladder.score(ladder.plugged(ladder.full, start))
