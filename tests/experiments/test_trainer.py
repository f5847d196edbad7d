"""The precision that the command line's Trainer chooses."""

import pytest
import torch

from fulgurite.experiments.trainer import AutoPrecisionTrainer, chosen_precision

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
