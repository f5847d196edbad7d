import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from fulgurite.callbacks import LossRateWindow
from fulgurite.callbacks.loss_rate import LossWindow, performance
from fulgurite.errors import InputError


def test_forms_on_losses_that_can_be_computed_by_hand():
    falling = [5.0, 4.0, 3.0]  # mean 4, minimum 3
    assert performance(falling) == pytest.approx(2.0)
    assert performance(falling, "relative") == pytest.approx(0.4)
    assert performance(falling, "sum") == pytest.approx(0.4 + 0.25)
    assert performance(falling, "product") == pytest.approx(0.4 * 0.25)
    assert performance([3.0, 3.0, 3.0]) == 0
    assert performance([3.0, 4.0, 5.0]) == pytest.approx(-2.0)


@given(
    st.lists(st.floats(0.1, 20), min_size=5, max_size=30).filter(lambda losses: max(losses) - min(losses) > 1e-3),
    st.floats(0.5, 100),
)
def test_deviation_is_free_of_the_scale(losses, scale):
    assert performance([scale * loss for loss in losses]) == pytest.approx(performance(losses), rel=1e-3, abs=1e-4)


def test_steady_fall_gives_about_two_at_any_length():
    for length in (10, 50, 200):
        assert performance([10 - 0.01 * step for step in range(length + 1)]) == pytest.approx(2.0, rel=1e-3)


def test_says_nothing_before_the_window_is_full_and_leaves_out_what_is_not_finite():
    window = LossWindow(3)
    for loss in (4.0, float("nan"), 3.0, float("inf"), 2.0):
        window.push(loss)
        assert window.performance() is None
    window.push(1.0)
    assert window.performance() == pytest.approx(2.0)


def test_smoothing_calms_a_noisy_plateau():
    noise = [3 + (-1) ** step for step in range(61)]
    plain, smooth = LossWindow(51), LossWindow(51, smoothing=0.1)
    for loss in noise:
        plain.push(loss)
        smooth.push(loss)
    assert abs(smooth.losses[0] - smooth.losses[-1]) < 0.2 * abs(plain.losses[0] - plain.losses[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window": 0}, "window=0"), ({"form": "mean"}, "form='mean'.*deviation"), ({"smoothing": 0}, "smoothing=0")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LossRateWindow(**settings)


class Falling(LightningModule):
    """Its loss is 100 - the number of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return 100 - batch.float().mean() + 0 * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback, steps, ckpt_path=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(Falling(), torch.utils.data.DataLoader(torch.arange(100)), ckpt_path=ckpt_path)
    return trainer


def test_a_step_is_the_mean_of_its_accumulated_batches(tmp_path):
    callback = LossRateWindow(4)
    trainer = fit(callback, 6, accumulate_grad_batches=2, default_root_dir=tmp_path)
    assert list(callback.losses.losses) == [97.5, 95.5, 93.5, 91.5, 89.5]
    assert float(trainer.callback_metrics["loss_rate"]) == pytest.approx(2.0)


def test_state_is_in_checkpoints(tmp_path):
    first = LossRateWindow(4)
    trainer = fit(first, 6, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = LossRateWindow(4)
    fit(second, 8, ckpt_path=tmp_path / "a.ckpt", default_root_dir=tmp_path)
    assert list(second.losses.losses)[:3] == list(first.losses.losses)[2:]
