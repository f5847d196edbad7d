import dataclasses

import pytest

from fulgurite.callbacks.gradient_pruning import Adaptive, FixedRate, Measurement, PruningPolicy, PublishedRule
from fulgurite.callbacks.gradient_pruning.policy import LADDER, BytesAt, ChangeDetector
from fulgurite.errors import InputError

MILLION = 1_000_000


def bytes_of(ranks=2):
    return BytesAt(0, 4 * MILLION, ranks, 2, 4)


def measured(step=0, *, rate=0.0, compute=0.1, bandwidth=2.5e6, ranks=2, loss=3.0, seconds=None, bytes_at=None):
    """A step on a link of so many bytes a second."""
    sent = (bytes_at or bytes_of(ranks))(rate)
    busy = sent / bandwidth
    exposed = max(0.0, busy - compute / 2)
    return Measurement(step, loss, seconds or compute + exposed, exposed, busy, sent, rate, ranks)


def run(policy, bandwidths, *, compute=0.1, ranks=2, losses=None, late=0):
    """Return the rates that a policy chooses, step by step; measurements come late by some steps, behind a dense warm-up."""
    bytes_at = bytes_of(ranks)
    rates = [0.0] * late + [policy.start()]
    for step, bandwidth in enumerate(bandwidths):
        loss = losses[step] if losses else 5 - 0.01 * step
        settings = {"bandwidth": bandwidth, "compute": compute, "ranks": ranks, "loss": loss, "bytes_at": bytes_at}
        rates.append(policy.decide(measured(step, rate=rates[step], **settings), bytes_at))
    return rates[late + 1 :]


def test_bytes_of_a_step():
    bytes_at = BytesAt(100, 1000, 2, 4)
    assert bytes_at(0) == 1100 * 4  # a ring of two sends everything once
    assert bytes_at(0.99) == pytest.approx(2 * 100 + 0.01 * 1000 * 4)
    assert BytesAt(0, 1000, 4, 2)(0) == 1.5 * 1000 * 2
    assert BytesAt(0, 1000, 4, 2)(0.99) == pytest.approx(3 * 10 * 4)  # an all-gather
    assert BytesAt(100, 1000, 4, 2, 4)(0.2) == pytest.approx(1.5 * (100 * 2 + 1000 * (0.5 + 2 / 256)))  # two phases


def test_fixed_rate_and_its_ramp():
    assert set(run(FixedRate(0.99), [1e6] * 5)) == {0.99}
    ramp = run(FixedRate(0.99, ramp_steps=10), [1e6] * 20)
    assert ramp == sorted(ramp)
    assert ramp[0] == pytest.approx(0.75)
    assert ramp[-1] == 0.99


def test_published_rule_prunes_more_while_the_step_is_too_slow_and_then_keeps():
    rates = run(PublishedRule(decide_every=1, target_factor=1.5), [2.5e6] * 60)
    assert rates == sorted(rates)
    final = rates[-1]
    assert measured(rate=final).step_seconds <= 1.5 * 0.1
    below = LADDER[LADDER.index(final) - 1]
    assert measured(rate=below).step_seconds > 1.5 * 0.1


@pytest.mark.parametrize("decide_every", [1, 5])
def test_a_rate_is_kept_where_measurements_come_late(decide_every):
    """As with several ranks: the step that is known of is one of before the last change."""
    late, prompt = (run(PublishedRule(decide_every=decide_every), [2.5e6] * 60, late=late) for late in (1, 0))
    assert late == sorted(late)
    assert late[-1] == prompt[-1]


def test_a_policy_that_decides_nothing_keeps_the_rate_that_it_starts_with():
    class Half(PruningPolicy):
        def start(self):
            return 0.5

    assert set(run(Half(), [2.5e6] * 5, late=1)) == {0.5}
    silent = Adaptive(ladder=[0.5, 0.9])  # nothing was sent: nothing to decide by
    assert silent.decide(dataclasses.replace(measured(), bytes=0.0), bytes_of()) == silent.start() == 0.5


def test_published_rule_prunes_less_when_the_loss_does_not_fall():
    policy = PublishedRule(window=5, decide_every=1, when="always")
    rising = [3 + 0.1 * step for step in range(40)]
    assert run(policy, [2.5e6] * 40, losses=rising)[-1] == 0.0


def test_published_rule_waits_for_a_change_of_the_network():
    policy = PublishedRule(decide_every=1)
    rates = run(policy, [1e9] * 20 + [1e6] * 30)
    assert set(rates[:20]) == {0.0}
    assert rates[-1] > 0.9
    always = run(PublishedRule(decide_every=1, when="always"), [1e9] * 20 + [1e6] * 30)
    assert always[24] > rates[20]


def test_published_rule_tries_every_rung_of_its_ladder():
    policy = PublishedRule(decide_every=1, when="always", ladder=[0.5, 0.75, 0.9])
    assert policy.start() == 0.5
    assert list(dict.fromkeys(run(policy, [1e6] * 10))) == [0.75, 0.9]


def test_a_checkpoint_of_another_ladder_goes_on_at_the_nearest_rate():
    before, after = Adaptive(ladder=[0.0, 0.5, 0.9, 0.99]), Adaptive(ladder=[0.5, 0.9])
    run(before, [1e5] * 30)
    before.rung = 3
    after.load_state_dict(before.state_dict())
    assert after.start() == 0.9
    assert set(after.packing_seconds) <= {0, 1}


def test_target_in_seconds():
    assert PublishedRule(target_seconds=0.2).direction(None, measured(seconds=0.3)) == 1
    assert PublishedRule(target_seconds=0.4).direction(None, measured(seconds=0.3)) == 0
    assert PublishedRule().direction(-0.1, measured(seconds=0.3)) == -1


def mean_delay(rates):
    return sum(bytes_of().delay(rate) for rate in rates) / len(rates)


def test_adaptive_prunes_nothing_where_the_network_is_fast():
    assert set(run(Adaptive(), [1e9] * 50)) == {0.0}


@pytest.mark.parametrize("bandwidth", [12.5e6, 2.5e6, 1e6])
def test_adaptive_keeps_to_its_budget_on_a_steady_link(bandwidth):
    exact, usual, patient = (run(Adaptive(delay_budget=budget), [bandwidth] * 400) for budget in (0.0, 1.0, 30.0))
    assert min(usual[1:]) > 0
    assert mean_delay(exact) == 0
    assert mean_delay(usual) < 1.5
    assert mean_delay(patient) < 40
    sent = [sum(map(bytes_of(), rates)) for rates in (patient, usual, exact)]
    assert sent == sorted(sent)
    assert len(set(usual)) > 1 or bandwidth == 12.5e6


def test_adaptive_ends_with_every_entry_sent():
    policy, bytes_at, rate, rates = Adaptive(cooldown=0.25), bytes_of(), 0.0, []
    for step in range(100):
        measurement = measured(step, rate=rate, bandwidth=1e6)
        rate = policy.decide(dataclasses.replace(measurement, progress=step / 100), bytes_at)
        rates.append(rate)
    assert max(rates[:75]) >= 0.75
    assert set(rates[75:]) == {0.2}


def test_adaptive_prunes_where_it_saves_most():
    """Of a link that changes, the slow part is pruned, and the fast part is not."""
    link = ([50e6] * 30 + [1e6] * 10) * 6
    rates = run(Adaptive(), link)
    slow = [rate for rate, bandwidth in zip(rates, link) if bandwidth == 1e6]
    fast = [rate for rate, bandwidth in zip(rates, link) if bandwidth == 50e6]
    assert mean_delay(slow) > 4 * mean_delay(fast)


def test_adaptive_follows_the_link_both_ways():
    rates = run(Adaptive(), [1e9] * 10 + [2.5e6] * 10 + [1e9] * 15)
    assert rates[9] == 0.0
    assert rates[19] > 0
    assert rates[-1] == 0.0


def test_adaptive_remembers_what_selection_costs():
    """Where packing takes longer than it saves, everything is sent after one look."""
    policy, bytes_at, rate, rates = Adaptive(), bytes_of(), 0.0, []
    for step in range(40):
        packing = 0.0 if rate == 0 else 0.1
        measurement = measured(step, rate=rate, bandwidth=60e6, compute=0.1 + packing)
        rate = policy.decide(dataclasses.replace(measurement, packing_seconds=packing), bytes_at)
        rates.append(rate)
    assert max(rates[:5]) > 0
    assert rates.count(0.0) > 30


def test_adaptive_warms_up_with_every_entry_sent_in_the_cheapest_way():
    bytes_at = bytes_of()
    for bandwidth, expected in ((1e9, 0.0), (2.5e6, 0.2)):
        policy, rate = Adaptive(), 0.0
        for step in range(5):
            rate = policy.warm_up(measured(step, rate=rate, bandwidth=bandwidth), bytes_at)
        assert rate == policy.start() == expected
    assert Adaptive(ladder=[0.5, 0.9]).warm_up(measured(), bytes_at) == 0.0
    assert PublishedRule().warm_up(measured(), bytes_at) == 0.0


def test_adaptive_does_not_take_an_outage_for_a_slow_link():
    link = [25e6] * 20
    link[10] = 1e5
    rates = run(Adaptive(), link)
    assert rates[10] == rates[9] == rates[11]


def test_adaptive_steps_back_when_the_loss_rises():
    losses = [5 - 0.01 * step for step in range(60)] + [4.4 + 0.02 * step for step in range(60)]
    rates = run(Adaptive(window=20, smoothing=1.0, delay_budget=30), [2.5e6] * 120, losses=losses)
    assert rates[100] < rates[50]
    gentle = Adaptive()
    assert gentle.guarded(4, None) == gentle.guarded(4, 0.0) == 4
    assert gentle.guarded(4, -1.5) == 3
    assert gentle.guarded(4, -2.5) == 0


def test_a_sparse_exchange_that_sends_more_than_a_dense_one_is_a_dense_one():
    wide = BytesAt(0, 1000, 64, 2, 16)
    assert wide(0.05) == wide(0)
    assert wide.delay(0.05) == 0
    assert wide(0.75) < wide(0)


def test_all_entries_at_4_bits_take_a_quarter_of_the_bytes_with_any_number_of_ranks():
    for ranks in (2, 3, 8, 64, 1000):
        assert bytes_of(ranks)(0.2) / bytes_of(ranks)(0) == pytest.approx(0.254, abs=0.001)
        rates = [bytes_of(ranks)(rate) for rate in LADDER]
        assert rates == sorted(rates, reverse=True)


def test_state_goes_through_a_checkpoint():
    for make in (Adaptive, PublishedRule):
        one, two = make(window=5), make(window=5)
        run(one, [2.5e6] * 8)
        two.load_state_dict(one.state_dict())
        assert two.losses.performance() == one.losses.performance()
    assert two.state_dict() == one.state_dict()
    assert two.rate > 0
    of_an_earlier_version = PublishedRule()
    of_an_earlier_version.load_state_dict({"losses": [3.0], "adjusting": False})
    assert of_an_earlier_version.decide(measured(rate=0.9), bytes_of()) == 0.9
    ramp, again = FixedRate(0.99, ramp_steps=10), FixedRate(0.99, ramp_steps=10)
    run(ramp, [1e6] * 4)
    again.load_state_dict(ramp.state_dict())
    bytes_at = BytesAt(0, 10, 2, 2)
    assert again.decide(measured(8), bytes_at) == ramp.decide(measured(8), bytes_at)


def test_a_change_has_to_last():
    detector = ChangeDetector(share=0.3, hold=3)
    assert not any(detector.push(value) for value in [1.0] * 5 + [2.0, 2.0, 1.0, 1.0])
    assert [detector.push(2.0) for _ in range(3)] == [False, False, True]
    assert not detector.push(2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedRate(1.0), r"rate=\[1\.0\]: rates are shares"),
        (lambda: FixedRate(0.9, ramp_steps=-1), "ramp_steps=-1"),
        (lambda: PublishedRule(ladder=[0.9, 0.5]), "ladder="),
        (lambda: PublishedRule(target_seconds=0), "target_seconds=0"),
        (lambda: PublishedRule(target_factor=0.5), "target_factor=0.5"),
        (lambda: PublishedRule(when="never"), "when='never'"),
        (lambda: PublishedRule(decide_every=0), "decide_every=0"),
        (lambda: PublishedRule(change_hold=0), "hold=0"),
        (lambda: Adaptive(delay_budget=-1), "delay_budget=-1"),
        (lambda: Adaptive(cooldown=2), "cooldown=2"),
        (lambda: Adaptive(wary=-2, alarmed=-1), "alarmed=-1 is above wary=-2"),
        (lambda: Adaptive(memory=0), "memory=0"),
        (lambda: Adaptive(window=0), "window=0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
