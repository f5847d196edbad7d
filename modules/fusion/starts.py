"""Where a small model begins: the best selection of a large one, or operators that start there and are learnt."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ...errors import InputError
from ..student import block_influence, decoder_layers
from .fused import FusedLinear, FusionOperators, fuse, materialise
from .initial import OperatorForms, empty_operators, initial_operators
from .layout import DOWN, linear_of
from .refit import HELD_OUT, refit
from .selection import Score, select_widths
from .shape import SIZES, FusionShape
from .statistics import Rows, second_moments

log = logging.getLogger(__name__)
Stage = Literal["width", "depth", "joint"]
Built = tuple[PreTrainedModel, list[int] | None]


@dataclass
class Fused:
    """A small model at the begin of a stage.

    Args:
        model: The model that operators make, or a plain one where nothing is learnt.
        centres: The layer of the model before that each of its layers starts as.
    """

    model: PreTrainedModel
    centres: list[int]


class FusionStart(ABC):
    """How a small model begins: with stages in which operators are learnt, or as a plain model.

    Args:
        calibration_tokens: Tokens of the training data that the large model is measured on.

    Raises:
        InputError: If there are none.
    """

    can_keep_layers = False

    def __init__(self, calibration_tokens: int) -> None:
        if calibration_tokens < 1:
            raise InputError(f"calibration_tokens={calibration_tokens} measures nothing. Legal: 1 or more.")
        self.calibration_tokens = calibration_tokens

    def stages(self, config: Any, shape: FusionShape) -> list[Stage]:
        """Return the stages in which operators are learnt, in order.

        Args:
            config: Of the large model.
            shape: Of the small one, all sizes filled in.

        Raises:
            InputError: If this start cannot make the shape.
        """
        if shape.kept_layers and not self.can_keep_layers:
            raise InputError(
                f"shape.kept_layers={shape.kept_layers}: start={type(self).__name__} changes layers wherever it likes. Legal: 0, "
                "or another start: LearnedFusion, BestSelection, KeepLayers."
            )
        return []

    @abstractmethod
    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """Return the small model of a start without stages, and for each of its layers the large one's that it comes from.

        In place of the latter None, where layers come from several or from none.

        Args:
            large: The large model; it is used up.
            shape: Of the small one, all sizes filled in.
            rows: Calibration text, of ``rows_of``.
        """


class BestSelection(FusionStart):
    """The neurons, heads and layers that matter most, folded and refitted; nothing is learnt but by training what comes out.

    Args:
        score: What makes neurons and heads matter; see ``select_widths``.
        residual: What is kept of a residual stream that becomes narrower: its ``dimensions`` or principal ``directions`` with the
            most energy. Directions alone, in one rotation for the whole model so that embeddings stay tied, are SliceGPT's
            (arXiv 2401.15024).
        fold: Whether what is kept of a width makes up for the rest by least squares.
        refit: Whether each layer's down projection is fitted to the large model's residual stream, layer by layer; see ``refit``.
        calibration_tokens: Tokens of the training data that all this is measured on.

    Raises:
        InputError: If a value is out of range.
    """

    can_keep_layers = True

    def __init__(
        self,
        *,
        score: Score = "energy",
        residual: Literal["dimensions", "directions"] = "dimensions",
        fold: bool = True,
        refit: bool = True,
        calibration_tokens: int = 32768,
    ) -> None:
        if score not in ("energy", "taylor"):
            raise InputError(f"score={score!r} is unknown. Legal: energy, taylor.")
        super().__init__(calibration_tokens)
        if residual not in ("dimensions", "directions"):
            raise InputError(f"residual={residual!r} is unknown. Legal: dimensions, directions.")
        self.score: Score = score
        self.forms = OperatorForms("frozen" if residual == "dimensions" else None, "frozen", "frozen")
        self.fold, self.refit, self.field = fold, refit, 0

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        fused = self._fused("joint", large, shape, rows)
        plain = materialise(fused.model)
        self._fit(plain, large, fused, rows, shape.kept_layers)
        return plain, fused.centres

    def begin(self, stage: Stage, model: PreTrainedModel, shape: FusionShape, rows: Rows) -> Fused:
        """Return the model whose operators are learnt in a stage.

        Args:
            stage: ``width`` fuses widths and keeps all layers, ``depth`` fuses layers, ``joint`` both at once.
            model: The plain model that the stage before made, the large one in the first; it becomes a part of the result.
            shape: Of the small one, all sizes filled in.
            rows: Calibration text, of ``rows_of``.
        """
        fused = self._fused(stage, model, shape, rows)
        downs = [layer.get_submodule(DOWN) for layer in decoder_layers(fused.model)]
        if self.refit and not all(isinstance(down, FusedLinear) and down.can_start_anywhere(stage == "depth") for down in downs):
            log.info("No refit in the %s stage: the operators on what the down projections read are not dense.", stage)
            return fused
        plain = materialise(fused.model)
        if self._fit(plain, model, fused, rows, shape.kept_layers):
            fitted_layers = list(decoder_layers(plain))[shape.kept_layers :]
            for down, fitted in zip(downs[shape.kept_layers :], fitted_layers):
                down.start_at(linear_of(fitted, DOWN).weight)  # type: ignore[operator]
        return fused

    def _fused(self, stage: Stage, model: PreTrainedModel, shape: FusionShape, rows: Rows) -> Fused:
        layers = int(model.config.num_hidden_layers)
        target = self.shape_of(stage, model.config, shape)
        count = target.num_hidden_layers or layers
        centres = list(range(layers)) if count == layers else important_layers(model, count, rows, shape.kept_layers)
        operators = self._absent(layers) if stage == "depth" else self._operators(model, target, rows)
        fused = fuse(model, target, operators, centres=centres, field=0 if stage == "width" else self.field)
        return Fused(fused, centres)

    @staticmethod
    def shape_of(stage: Stage, config: Any, shape: FusionShape) -> FusionShape:
        """Return the shape of a stage's model, which is made of one with a config."""
        return replace(shape, num_hidden_layers=config.num_hidden_layers) if stage == "width" else shape

    @staticmethod
    def _absent(layers: int) -> FusionOperators:
        return FusionOperators([{} for _ in range(layers)])

    def _operators(self, model: PreTrainedModel, shape: FusionShape, rows: Rows) -> FusionOperators:
        tested = max(1, round(HELD_OUT * len(rows)))
        seen, other = second_moments(model, rows[tested:] or rows), second_moments(model, rows[:tested])
        chosen = select_widths(model, shape, seen, rows, self.score)
        return initial_operators(model, shape, chosen, seen, other, self.forms, folded=self.fold)

    def _fit(self, plain: PreTrainedModel, model: PreTrainedModel, fused: Fused, rows: Rows, kept: int) -> bool:
        """Refit a plain model to the one that it was made of, if wanted; return whether it was."""
        residual = fused.model.operators.residual  # type: ignore[union-attr]
        missing = (
            refit(plain, model, fused.centres, rows, residual=residual, kept=kept)  # type: ignore[arg-type]
            if self.refit
            else []
        )
        if missing:
            log.info("Refit: %.2f %% of the residual stream's energy is missing behind the last layer", 100 * missing[-1])
        return bool(missing)


class LearnedFusion(BestSelection):
    """Operators over widths and layers that start at the best selection and are learnt.

    Follows LEMON (ACL 2024, long 434): width first, then depth. It differs in its start, which is a selection with least-squares
    folds and a refit, in one residual operator for the whole model, which keeps embeddings tied and shortcuts free, and in
    operators on queries and keys that commute with rotary embeddings.

    Args:
        score: What makes neurons and heads matter at the start; see ``select_widths``.
        fold: Whether what is kept of a width starts by making up for the rest by least squares.
        refit: Whether down projections start fitted to the large model's residual stream; see ``refit``.
        calibration_tokens: Tokens of the training data that the start is measured on.
        operators: How much of each operator is learnt.
        order: ``width_depth`` learns widths, and then depth on what came out; ``joint`` both at once.
        field: Receptive field in depth: a layer is mixed from layers up to this far from the one that it starts as.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        score: Score = "energy",
        fold: bool = True,
        refit: bool = True,
        calibration_tokens: int = 32768,
        operators: OperatorForms = OperatorForms(),  # noqa: B008  (frozen)
        order: Literal["width_depth", "joint"] = "width_depth",
        field: int = 1,
    ) -> None:
        super().__init__(score=score, fold=fold, refit=refit, calibration_tokens=calibration_tokens)
        if order not in ("width_depth", "joint"):
            raise InputError(f"order={order!r} is unknown. Legal: width_depth, joint.")
        if field < 0:
            raise InputError(f"field={field} is below 0. Legal: 0 (each layer by itself) or more.")
        self.forms, self.order, self.field = operators, order, field

    def stages(self, config: Any, shape: FusionShape) -> list[Stage]:
        """See ``FusionStart``."""
        depth = shape.num_hidden_layers != config.num_hidden_layers
        if shape.kept_layers and self.forms.residual == "dense":
            raise InputError(
                f"start.operators.residual='dense' changes every layer, but shape.kept_layers={shape.kept_layers} keeps some. "
                "Leave one of them out."
            )
        width = self.forms.residual == "dense" or any(
            getattr(shape, name) != getattr(config, name) for name in SIZES if name != "num_hidden_layers"
        )
        if self.order == "joint" and width and depth:
            return ["joint"]
        return [*(["width"] if width else []), *(["depth"] if depth else [])]  # type: ignore[list-item]

    def again(self, stage: Stage, model: PreTrainedModel, shape: FusionShape, centres: list[int]) -> PreTrainedModel:
        """Return a stage's model as ``begin`` made it, but for all its numbers, which a checkpoint brings.

        Args:
            stage: See ``begin``.
            model: See ``begin``.
            shape: See ``begin``.
            centres: Of what ``begin`` returned.
        """
        target = self.shape_of(stage, model.config, shape)
        operators = (
            self._absent(int(model.config.num_hidden_layers))
            if stage == "depth"
            else empty_operators(model, target, self.forms, folded=self.fold)
        )
        return fuse(model, target, operators, centres=centres, field=0 if stage == "width" else self.field)


def important_layers(model: PreTrainedModel, count: int, rows: Rows, first: int = 0) -> list[int]:
    """Return the layers that change the residual stream most, rising (ShortGPT, arXiv 2403.03853).

    Args:
        model: The large model.
        count: How many are kept.
        rows: Calibration text, of ``rows_of``.
        first: So many of the first ones are kept in any case.
    """
    tokens = sum(row["input_ids"].numel() for row in rows)
    influence = sum(block_influence(model, row) * (row["input_ids"].numel() / tokens) for row in rows)
    assert isinstance(influence, torch.Tensor)
    influence[:first] = torch.inf
    return sorted(influence.argsort(descending=True, stable=True)[:count].tolist())
