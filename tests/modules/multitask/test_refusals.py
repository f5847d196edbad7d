"""What is refused, most of it before any weight is loaded."""

from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torchjd.aggregation import MGDA, Constant, ConstantWeighting, PCGrad, UPGrad
from torchjd.scalarization import DWA, FAMO, UW, GeometricMean

from fulgurite.callbacks import TaskSchedule
from fulgurite.errors import InputError
from fulgurite.modules import FeatureWeighting, TransformerBranch
from fulgurite.modules.multitask import LeastSquaresProjector, checks, module
from fulgurite.modules.multitask.checks import check_combination
from fulgurite.modules.multitask.combination import combination_state

from .small import trunk_of
from .system import fit, model


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(module, "load_trunk", lambda *_: pytest.fail("weights were loaded before the refusal"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": {"parity": TransformerBranch()}}, "branches has none for task 'text/next_words'"),
        ({"branches": {"other": TransformerBranch()}}, "branches has 'other', which is no task of the data"),
        ({"loss_weights": {"parities": 1.0}}, "loss_weights has 'parities', which is no task of the data"),
        (
            {"loss_weights": {"text": 2.0}},
            "loss_weights has 'text', which has a branch for each aim. Give theirs: text/next_words",
        ),
        ({"loss_weights": {"parity": -1.0}}, "loss_weights.parity=-1.0 is below 0"),
        ({"branch_layers": -1}, "branch.layers=-1 is below 0"),
        ({"combination_rate": 0.0}, "combination_rate=0.0: the combination would learn nothing. Legal: above 0"),
        ({"branch_rate": -1.0}, "branch_rate=-1.0: the branch would learn nothing. Legal: above 0"),
        ({"branch_pooling": "last"}, "branch.pooling='last' is unknown. Legal: first, mean, or null"),
        ({"period": 0}, "period=0. Legal: 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 writes nothing"),
        ({"fresh": {"hidden_sizes": 4}}, "fresh has 'hidden_sizes', which the model's config has not"),
    ],
)
def test_bad_settings_are_refused(data, no_weights, settings, message):
    with pytest.raises(InputError) as caught:
        fit(model(**settings), data(), 1)
    assert message in str(caught.value)


def test_texts_longer_than_an_encoders_positions_are_refused(data):
    made = data()
    fit(model(), made, 1)
    encoder = trunk_of("bert", max_position_embeddings=40).model.config
    with (
        mock.patch.object(checks, "load_config", return_value=encoder),
        pytest.raises(InputError, match="tasks.text.length=48: source='random:tiny' has positions for 40 tokens"),
    ):
        checks.check_tasks(made, "random:tiny", None, None, {})


def test_combinations_that_compare_need_all_tasks(data, no_weights):
    with pytest.raises(InputError, match="combination=UPGrad compares tasks, but data.batches='task' brings one at a time"):
        fit(model(UPGrad(projector=LeastSquaresProjector())), data(batches="task"), 1)
    with pytest.raises(InputError, match="combination=UW needs all tasks from the start, but TaskSchedule adds some later"):
        fit(model(UW(5)), data(), 1, callbacks=[TaskSchedule({"text": 1})])


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (lambda: UW(4), "combination=UW cannot combine 5 branches, which are there at step 0 (one for each task, of a text task"),
        (lambda: FAMO(6), "combination=FAMO cannot combine 5 branches"),
        (lambda: Constant(torch.ones(3)), "combination=Constant cannot combine 5 branches"),
        (lambda: FeatureWeighting(ConstantWeighting(torch.ones(3))), "combination=FeatureWeighting cannot combine 5 branches"),
    ],
)
def test_combinations_for_another_number_of_branches_are_refused(data, no_weights, combination, message):
    with pytest.raises(InputError) as caught:
        fit(model(combination()), data(), 1)
    assert message in str(caught.value)


def test_combinations_that_cannot_do_with_a_branch_without_targets(data, caplog):
    made = data()
    fit(model(None), made, 1)
    caplog.clear()
    with pytest.raises(InputError, match="combination=GeometricMean makes gradients that are no numbers from a batch in which"):
        check_combination(GeometricMean(), made, SingleDeviceStrategy(), "32-true")
    check_combination(MGDA(), made, SingleDeviceStrategy(), "32-true")
    assert "combination=MGDA learns nothing from a batch in which a branch has no targets, as may be with" in caplog.text
    caplog.clear()
    for combination in (UPGrad(projector=LeastSquaresProjector()), FeatureWeighting(), DWA(), PCGrad()):
        check_combination(combination, made, SingleDeviceStrategy(), "32-true")
    assert not caplog.text


def test_combinations_that_cannot_take_more_branches_are_refused_beside_a_schedule(data, no_weights):
    with pytest.raises(InputError, match="combination=Constant cannot combine 1 branches, which are there at step 0"):
        fit(model(Constant(torch.ones(5))), data(), 3, callbacks=[TaskSchedule({"text": 2})])


def test_a_trial_leaves_combination_and_random_numbers_as_they_are(data):
    module, made = model(DWA()), data()
    fit(module, made, 1)
    before, state = torch.get_rng_state(), combination_state(module.combination)
    for combination in (module.combination, PCGrad()):
        check_combination(combination, made, SingleDeviceStrategy(), "32-true")
    assert torch.equal(torch.get_rng_state(), before)
    assert str(combination_state(module.combination)) == str(state)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
def test_precisions_that_aggregators_cannot_serve_are_refused(data, precision):
    made = data()
    fit(model(), made, 1)
    with pytest.raises(InputError, match=f"precision={precision}: combination=PCGrad .* Legal: 32-true, bf16-mixed"):
        check_combination(PCGrad(), made, SingleDeviceStrategy(), precision)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({"tekst": 1}, "starts has 'tekst', which is no task of the data"),
        ({"text": 1, "parity": 2}, "no task is there from the start"),
        ({"text": -1}, "starts.text=-1 is below 0"),
        ({"text": 1}, "starts.text=1: the run ends after 1 optimizer steps. Legal: 0 to 0"),
    ],
)
def test_bad_schedules_are_refused(data, starts, message):
    with pytest.raises(InputError, match=message):
        fit(model(), data(), 1, callbacks=[TaskSchedule(starts)])
