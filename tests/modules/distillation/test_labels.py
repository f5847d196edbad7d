import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.distillation import labels as module
from fulgurite.modules.distillation.labels import LabelSettings, SoftLabels, sampling_chances, select_labels

TOKENS, HIDDEN, VOCABULARY = 23, 6, 701


@pytest.fixture
def teacher():
    torch.manual_seed(3)
    states, weight = torch.randn(TOKENS, HIDDEN) * torch.linspace(0.1, 2, TOKENS)[:, None], torch.randn(VOCABULARY, HIDDEN)
    return states, weight, torch.randint(VOCABULARY, (TOKENS,)), (states @ weight.t()).double()


@pytest.mark.parametrize(("chunk_tokens", "chunk_vocabulary"), [(256, 16384), (7, 100), (1, 3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fixed_selection_equals_the_full_softmax(teacher, chunk_tokens, chunk_vocabulary, temperature):
    states, weight, realised, logits = teacher
    settings = LabelSettings(k=9, temperature=temperature)
    kept = select_labels(states, weight, realised, settings, chunk_tokens=chunk_tokens, chunk_vocabulary=chunk_vocabulary)
    p = (logits / temperature).softmax(1)
    top = p.topk(9, dim=1)
    assert torch.equal(kept.ids.long(), top.indices)
    assert torch.allclose(kept.probabilities.double(), top.values, rtol=2**-8)
    assert torch.allclose(kept.tail.double(), 1 - top.values.sum(1), rtol=2**-7, atol=1e-5)
    assert torch.allclose(kept.realised.double(), p.gather(1, realised[:, None])[:, 0].log(), rtol=2**-7)
    assert kept.temperature == temperature


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("cap", [None, 40])
@pytest.mark.parametrize("first_look", [512, 4])  # the second needs several looks at the flat rows
def test_adaptive_keeps_the_fewest_that_reach_the_threshold(teacher, threshold, cap, first_look, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_LOOK", first_look)
    states, weight, realised, logits = teacher
    settings = LabelSettings(selection="adaptive", k=cap, threshold=threshold)
    kept = select_labels(states, weight, realised, settings, chunk_tokens=10)
    ordered = logits.softmax(1).sort(dim=1, descending=True).values
    needed = ((ordered.cumsum(1) - ordered) < threshold - 1e-9).sum(1).clamp(max=cap or VOCABULARY)
    assert (kept.counts - needed).abs().max() <= (1 if threshold < 1 else VOCABULARY)  # float32 at the boundary
    for row in range(TOKENS):
        count = int(kept.counts[row])
        chosen = kept.ids[row, :count].long()
        assert len(chosen.unique()) == count
        assert torch.allclose(logits.softmax(1)[row, chosen], ordered[row, :count], rtol=1e-4)  # ties may swap
        assert bool((kept.ids[row, count:] == -1).all())
        assert bool((kept.probabilities[row, count:] == 0).all())
    mass = kept.probabilities.double().sum(1) + kept.tail.double()
    assert torch.allclose(mass, torch.ones_like(mass), atol=0.01)


def test_concatenation_pads_to_the_widest(teacher):
    states, weight, realised, _ = teacher
    parts = [select_labels(states, weight, realised, LabelSettings(k=k)) for k in (2, 5)]
    joined = SoftLabels.concatenate(parts)
    assert joined.ids.shape == (2 * TOKENS, 5)
    assert joined.counts.tolist() == [2] * TOKENS + [5] * TOKENS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LabelSettings(k=702), r"k=702 .* Legal: 1 to 701"),
        (LabelSettings(k=0), "k=0"),
        (LabelSettings(k=None), "k=None"),
        (LabelSettings(selection="adaptive", threshold=0.0), "threshold=0.0"),
        (LabelSettings(selection="adaptive", threshold=1.5), "threshold=1.5"),
        (LabelSettings(temperature=0.0), "temperature=0.0"),
        (LabelSettings(selection="most"), "selection='most'.*Legal: fixed, adaptive, sampled"),
        (LabelSettings(selection="sampled", theta=0.0), "theta=0.0"),
        (LabelSettings(selection="sampled", theta=0.7), "theta=0.7"),
        (LabelSettings(selection="sampled", temperature=2.0), "temperature=2.0"),
        (LabelSettings(selection="random", k=None), "k=None"),
        (LabelSettings(selection="random", k=1), "k=1 draws"),
        (LabelSettings(selection="random", k=300), "Legal: 2 to 256"),
        (LabelSettings(temperature=float("inf")), "temperature=inf"),
    ],
)
def test_bad_settings_are_refused_by_name(teacher, settings, message):
    states, weight, realised, _ = teacher
    with pytest.raises(InputError, match=message):
        select_labels(states, weight, realised, settings)


def on_average(states, weight, realised, settings, chances):
    """Return the mean of the probabilities kept with different chances [chances, draws], scattered over the vocabulary."""
    total = torch.zeros(len(realised), VOCABULARY, dtype=torch.float64)
    for chance in chances:
        kept = select_labels(states, weight, realised, settings, chances=chance.expand(len(realised), -1))
        total.scatter_add_(1, kept.ids.long().clamp(min=0), kept.probabilities.double())
    return total / len(chances)


def test_sampled_labels_are_unbiased(teacher):
    states, weight, realised, logits = teacher
    settings = LabelSettings(selection="sampled", theta=0.03)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    mean, p = on_average(states, weight, realised, settings, grid[:, None]), logits.softmax(1)
    assert (mean - p)[p < settings.floor].abs().max() < settings.floor / 1000  # the grid is that fine
    assert torch.allclose(mean[p >= settings.floor], p[p >= settings.floor], rtol=2**-8)


def test_sampled_labels_cost_little_and_keep_the_likely_exactly(teacher):
    states, weight, realised, logits = teacher
    settings = LabelSettings(selection="sampled", theta=0.03)
    kept = select_labels(states, weight, realised, settings, chances=torch.full((TOKENS, 1), 0.4, dtype=torch.float64))
    p = logits.softmax(1)
    assert kept.unbiased
    for row in range(TOKENS):
        count, exact = int(kept.counts[row]), p[row] >= settings.floor
        assert set(exact.nonzero()[:, 0].tolist()) <= set(kept.ids[row, :count].tolist())
        drawn = count - int(exact.sum())
        assert drawn == pytest.approx(float(p[row][~exact].sum()) / settings.floor, abs=1)
        assert torch.all(kept.probabilities[row, int(exact.sum()) : count] == settings.floor)
        assert float(kept.tail[row]) == pytest.approx(float(p[row][~exact].sum()), rel=2**-7, abs=1e-6)
    assert torch.equal(kept.probabilities, kept.probabilities.sort(dim=1, descending=True).values)


def test_random_labels_are_unbiased_counts(teacher):
    states, weight, realised, logits = teacher
    settings = LabelSettings(selection="random", k=40)
    torch.manual_seed(0)
    mean = on_average(states, weight, realised, settings, torch.rand(500, 40, dtype=torch.float64))
    p = logits.softmax(1)
    deviation = (p * (1 - p) / (500 * 40)).sqrt()
    assert ((mean - p).abs() < 5 * deviation + 1e-3).all()
    assert torch.allclose(mean.sum(1), torch.ones(TOKENS, dtype=torch.float64), atol=5e-3)  # bfloat16


def test_chances_depend_on_the_tokens_alone():
    ids, starts = torch.arange(12).reshape(2, 6), torch.arange(6).expand(2, 6)
    settings = LabelSettings(selection="sampled")
    supervised = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    both = sampling_chances(ids, starts, supervised, settings)
    assert both.shape == (8, 1)
    assert torch.equal(both[5:], sampling_chances(ids[1:, :4], starts[1:, :4], supervised[1:, :4], settings))  # less padding
    assert sampling_chances(ids, starts, supervised, LabelSettings(selection="random", k=7)).shape == (8, 7)
    assert sampling_chances(ids, starts, supervised, LabelSettings()) is None


def test_settings_of_other_selections_do_not_change_what_labels_are():
    assert LabelSettings(theta=0.1).identity() == LabelSettings().identity()
    assert LabelSettings(selection="sampled", theta=0.1).identity() != LabelSettings(selection="sampled").identity()
