import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from fulgurite.callbacks import TrainUntilCondition
from fulgurite.errors import InputError


class Scripted(LightningModule):
    """Its loss at each step is what a script says."""

    def __init__(self, losses):
        super().__init__()
        self.losses, self.weight = losses, torch.nn.Parameter(torch.zeros(()))
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return self.weight * 0 + self.losses[self.global_step]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Staged(Scripted):
    in_last_stage = False

    def __init__(self, losses, stages):
        super().__init__(losses)
        self.left, self.begun = stages - 1, []

    def begin_next_stage(self):
        self.left -= 1
        self.in_last_stage = self.left == 0
        self.begun.append(self.global_step)


def trained(tmp_path, module, callback, **settings):
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **{"max_steps": len(module.losses), **settings},
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(1000)))
    return trainer


FALLING = [5 - 0.1 * step for step in range(40)]
FLAT = FALLING[:20] + [3.0] * 20


@pytest.mark.parametrize(
    ("settings", "losses", "steps"),
    [
        ({"max_steps": 7}, FALLING, 7),
        ({"below": 3.05, "window": 1}, FALLING, 21),  # the 21st is 3.0
        ({"below": 3.05, "window": 3}, FALLING, 22),  # the mean of 3.1, 3.0 and 2.9
        ({"flat": 0.0, "window": 4}, FLAT, 28),  # 8 steps alike, the first of them the 21st
        ({"flat": 0.05, "window": 4}, FALLING, 40),  # 8 % and more: never
        ({"below": 0.5, "window": 1}, FALLING, 40),
    ],
)
def test_ends_when_a_condition_holds_and_not_before(tmp_path, settings, losses, steps):
    assert trained(tmp_path, Scripted(losses), TrainUntilCondition(**settings)).global_step == steps


def test_counts_optimizer_steps_and_takes_their_mean(tmp_path):
    module = Scripted(FALLING)
    trainer = trained(tmp_path, module, TrainUntilCondition(max_steps=5), accumulate_grad_batches=3)
    assert trainer.global_step == 5
    assert module.seen == 15


def test_stages_are_counted_from_their_own_begin(tmp_path):
    module = Staged(FALLING, 3)
    assert trained(tmp_path, module, TrainUntilCondition(max_steps=7)).global_step == 40  # the last one is the Trainer's
    assert module.begun == [7, 14]


def test_each_stage_may_have_its_own_number_of_steps(tmp_path):
    module = Staged(FALLING, 4)
    trained(tmp_path, module, TrainUntilCondition(max_steps=[5, 2]))
    assert module.begun == [5, 7, 9]


def test_steps_may_be_given_by_the_stages_names(tmp_path):
    class Named(Staged):
        STAGES = ("width", "depth")

        @property
        def stage_name(self):
            return "" if self.in_last_stage else self.STAGES[len(self.begun)]

    module = Named(FALLING, 3)
    trained(tmp_path, module, TrainUntilCondition(max_steps={"width": 5, "depth": 2}))
    assert module.begun == [5, 7]
    other = Named(FALLING, 3)
    trained(tmp_path, other, TrainUntilCondition(max_steps={"depth": 2}))
    assert other.begun == []
    with pytest.raises(InputError, match="there is no stage 'widht'. Did you mean 'width'"):
        trained(tmp_path, module, TrainUntilCondition(max_steps={"widht": 2}))
    with pytest.raises(InputError, match="Scripted has no stages with names. Give a number"):
        trained(tmp_path, Scripted(FALLING), TrainUntilCondition(max_steps={"width": 2}))


def test_a_loss_that_is_not_finite_counts_as_a_step_alone(tmp_path):
    losses = [float("nan"), 1.0, float("inf"), 1.0, 9.0, 9.0]
    assert trained(tmp_path, Scripted(losses), TrainUntilCondition(below=2.0, window=2)).global_step == 4


@given(st.integers(0, 12))
def test_state_goes_on_where_it_was(seen):
    whole, first, second = (TrainUntilCondition(flat=0.01, window=3, max_steps=20) for _ in range(3))
    losses = [4 - 0.02 * step for step in range(12)]
    for callback, part in ((whole, losses), (first, losses[:seen])):
        callback._losses.extend(part)
        callback._count = len(part)
    second.load_state_dict(first.state_dict())
    second._losses.extend(losses[seen:])
    second._count += 12 - seen
    assert second.state_dict() == whole.state_dict()
    assert second.reason() == whole.reason()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no condition: give below, flat or max_steps"),
        ({"flat": 1.0}, "flat=1.0"),
        ({"window": 0, "below": 1.0}, "window=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": [3, 0]}, "max_steps=\\[3, 0\\] trains nothing"),
        ({"max_steps": []}, "max_steps=\\[\\] trains nothing"),
        ({"max_steps": {"depth": 0}}, "max_steps={'depth': 0} trains nothing"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainUntilCondition(**settings)
