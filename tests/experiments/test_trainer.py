"""The precision that the command line's Trainer chooses."""

from functools import partial
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from fulgurite.experiments.trainer import AutoPrecisionTrainer, LayerwiseFSDPStrategy, chosen_precision
from fulgurite.modules.base import PretrainedModule
from fulgurite.modules.tiny import tiny_model

_CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


@pytest.fixture(params=[True, False], ids=["bfloat16", "without"])
def able(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": request.param})
    return request.param


def test_auto_is_what_the_processor_is_fast_in(able):
    assert AutoPrecisionTrainer(precision="auto", **_CPU).precision == ("bf16-mixed" if able else "32-true")


@pytest.mark.parametrize("given", ["bf16-mixed", "bf16-true"])
def test_a_precision_that_is_given_stays_with_a_warning_where_it_is_slow(able, given, caplog):
    assert AutoPrecisionTrainer(precision=given, **_CPU).precision == given
    assert (f"trainer.precision={given}: this processor has no instructions for bfloat16" in caplog.text) is not able


def test_others_are_left_to_lightning(able, caplog):
    assert AutoPrecisionTrainer(**_CPU).precision == "32-true"
    assert chosen_precision("16-mixed", "cpu") == "16-mixed"
    assert "bfloat16" not in caplog.text
    with pytest.raises(ValueError, match="half"):
        AutoPrecisionTrainer(precision="half", **_CPU)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload"])
def test_weights_are_divided_by_layers_and_positions_stay_exact(name):
    strategy = AutoPrecisionTrainer(strategy=name, devices=2, precision="bf16-mixed", **_CPU).strategy
    assert isinstance(strategy, LayerwiseFSDPStrategy)
    model = tiny_model().model
    divides = partial(strategy.kwargs["auto_wrap_policy"], recurse=False, nonwrapped_numel=0)
    assert [divides(module=module) for module in (*model.layers, model)] == [True] * len(model.layers) + [False]
    assert strategy.cpu_offload.offload_params is (name == "fsdp_cpu_offload")
    config = strategy.mixed_precision_config
    assert (config.param_dtype, config.buffer_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), None])
def test_divided_gradients_are_clipped_by_the_model_that_holds_them(strategy):
    module = mock.Mock(trainer=mock.Mock(strategy=strategy or mock.Mock()))
    if strategy is not None:
        strategy.model = mock.Mock()
    PretrainedModule.configure_gradient_clipping(module, None, 0.5, "norm")
    if strategy is None:
        module.clip_gradients.assert_called_once_with(None, 0.5, "norm")
    else:
        strategy.model.clip_grad_norm_.assert_called_once_with(0.5)
        module.clip_gradients.assert_not_called()
