"""Exports the trained model as a folder that plain ``transformers`` loads."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import GenerationConfig, PreTrainedModel

from .. import __version__
from ..datamodules.base import data_hashes
from ..errors import InputError
from ..files import atomic_folder, check_replaceable
from ..modules.base import PretrainedModule
from ..modules.language_model import LanguageModel
from ..modules.pretrained import load_generation_config

log = logging.getLogger(__name__)

_LOADERS = ("ForSequenceClassification", "ForTokenClassification", "ForCausalLM")


class ExportPretrained(Callback):
    """At the end of ``fit``, writes weights, config, tokenizer, generation config and a model card.

    The last weights go to ``folder``; where a ``ModelCheckpoint`` has kept a best one of an earlier step, its weights go to
    ``<folder>-best``, unless they are of a stage that trains something else than the model (operators). An earlier export is
    replaced only when the new one is complete; a folder that holds something else is left as it is.

    Args:
        folder: Where to write; None is ``export`` in the run's folder.
        dtype: Type of the exported weights: ``float32``, ``bfloat16`` or ``float16``; None keeps the training's.
        best: Also export the best checkpoint.

    Raises:
        InputError: If ``dtype`` is unknown, the module is no ``LanguageModel``, or ``folder`` is no place for an export.
    """

    def __init__(self, folder: str | None = None, *, dtype: str | None = "bfloat16", best: bool = True) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise InputError(f"dtype={dtype!r} is unknown. Legal: float32, bfloat16, float16, null.")
        self.folder, self.dtype, self.best = folder, dtype, best
        self.written: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has no ``transformers`` model, before training."""
        if not isinstance(pl_module, LanguageModel):
            raise InputError(f"ExportPretrained exports a LanguageModel, not a {type(pl_module).__name__}.")
        if self.folder is not None:
            check_replaceable(Path(self.folder), "config.json")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folders."""
        if getattr(trainer, "fast_dev_run", False) and self.folder is None:
            return
        assert isinstance(pl_module, LanguageModel)
        pl_module.prepare_export()
        root = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "export"
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("val_")}
        last = trainer.strategy.lightning_module_state_dict()
        self._write(trainer, pl_module, root, last, trainer.global_step, metrics)
        for callback in trainer.checkpoint_callbacks if self.best else []:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and Path(callback.best_model_path).is_file():
                checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
                if checkpoint["global_step"] != trainer.global_step:
                    if checkpoint["state_dict"].keys() != last.keys():
                        log.warning(
                            "The best checkpoint, of step %d, is not exported: it is of another stage.", checkpoint["global_step"]
                        )
                        continue
                    folder = root.with_name(f"{root.name}-best")
                    figures = {callback.monitor: float(callback.best_model_score or 0)}
                    self._write(trainer, pl_module, folder, checkpoint["state_dict"], checkpoint["global_step"], figures)

    def _write(
        self, trainer: Trainer, module: LanguageModel, folder: Path, state: dict[str, Any], step: int, figures: dict[str, float]
    ) -> None:
        if not trainer.is_global_zero:
            return
        model = module.model
        assert model is not None
        weights = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
        dtype = getattr(torch, self.dtype) if self.dtype else None
        if dtype is not None:
            weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        with atomic_folder(folder) as new:
            model.save_pretrained(new, state_dict=weights)
            # save_pretrained names the type of the weights in memory, not of those that it was given.
            config = json.loads((new / "config.json").read_text())
            config["dtype"] = self.dtype or config["dtype"]
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            module.tokenizer.save_pretrained(new)
            generation = model.generation_config
            if generation is None or generation._from_model_config:  # of a model that was made of a config
                generation = load_generation_config(module.source.name) or GenerationConfig.from_model_config(model.config)
            generation.save_pretrained(new)
            (new / "README.md").write_text(model_card(trainer, module, model, step, figures), "utf-8")
            module.write_extras(new)  # some hash what is there
        self.written.append(folder)
        log.info("Exported step %d to %s", step, folder)


def model_card(
    trainer: Trainer,
    module: PretrainedModule,
    model: PreTrainedModel,
    step: int,
    figures: dict[str, float],
    task: str = "text-generation",
) -> str:
    """Return the model card: licence and source, method and its settings, data, figures, how to load it.

    Args:
        trainer: Trainer whose metrics and data are named.
        module: The trained module.
        model: What of it is exported.
        step: Optimizer step of the weights.
        figures: Validation figures of the weights.
        task: What the hub calls its use.
    """
    source = module.source
    parameters = sum(parameter.numel() for parameter in model.parameters())
    loader = next(name for name in _LOADERS if name in type(model).__name__)
    loader = f"AutoModel{loader}"
    settings = {name: value for name, value in module.hparams.items() if not name.startswith("_") and value is not None}
    lines = [
        "---",
        f"license: {source.licence or 'other'}",
        f"base_model: {source.title}",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "---",
        "",
        *([module.card_notice(), ""] if module.card_notice() else []),
        f"# {source.title}, {type(module).__name__}",
        "",
        f"{parameters / 1e6:.1f} M parameters, made by fulgurite {__version__} from {source.title} "
        f"(licence of the source: {source.licence or 'see there'}), step {step}.",
        "",
        "## Method",
        "",
        f"`{type(module).__name__}` with:",
        "",
        "```json",
        json.dumps(settings, indent=2, default=str),
        "```",
        "",
        "## Data",
        "",
        *[f"- {name}: `{value}`" for name, value in data_hashes(trainer).items()],
        "",
        "## Figures of these weights",
        "",
        *(
            [f"- {name}: {value:.4f}" for name, value in (figures | module.card_figures()).items()]
            or ["- none: the run had no validation"]
        ),
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model, tokenizer = (kind.from_pretrained("this/folder") for kind in ({loader}, AutoTokenizer))',
        "```",
        "",
    ]
    return "\n".join(lines)
