"""A tiny system, and its training."""

import torch
from lightning.pytorch import Trainer, seed_everything
from torchjd.aggregation import PCGrad, UPGrad
from torchjd.scalarization import DWA, FAMO, UW, Mean

from fulgurite.modules import FeatureWeighting, MultiTask
from fulgurite.modules.multitask import LeastSquaresProjector

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
NAMES = ["text/next_words", "text/masked_words", "text/distance", "text/order", "parity"]


def model(combination=None, rate=1e-3, **settings):
    seed_everything(0)
    return MultiTask(
        "random:tiny", combination=combination, optimizer=lambda parameters: torch.optim.AdamW(parameters, rate), **settings
    )


def fit(module, data, steps=4, **settings):
    callbacks = settings.pop("callbacks", [])
    path = settings.pop("ckpt_path", None)
    defaults = {"enable_checkpointing": False, "val_check_interval": 2, "limit_val_batches": 6}
    trainer = Trainer(max_steps=steps, callbacks=callbacks, **{**QUIET, **defaults, **settings})
    trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
    return trainer


COMBINATIONS = {
    "sum": lambda: None,
    "mean": Mean,
    "uncertainty": lambda: UW(5),
    "dwa": DWA,
    "famo": lambda: FAMO(5),
    "features": FeatureWeighting,
    "upgrad": lambda: UPGrad(projector=LeastSquaresProjector()),
    "pcgrad": PCGrad,
}
