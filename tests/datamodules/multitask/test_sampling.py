"""Which task comes when: shares, order, resumption, ranks."""

from collections import Counter

import pytest

from fulgurite.datamodules.multitask.sampling import TaskSampler, shares_of

SIZES = {"large": 80, "small": 5, "middle": 20}


def sampler(**settings):
    return TaskSampler(SIZES, **{"shares": shares_of(SIZES, 2.0), "batch_size": 6, "mixed": True, "seed": 3, **settings})


def batches(made, epochs=1):
    found = []
    for epoch in range(epochs):
        made.set_epoch(epoch)
        keys = list(made)
        assert len(keys) == len(made)
        found += [keys[place : place + made.batch_size] for place in range(0, len(keys), made.batch_size)]
    return found


def test_temperature_evens_the_shares():
    assert shares_of(SIZES, 1.0)["large"] == pytest.approx(80 / 105)
    even = shares_of(SIZES, 1e6)
    assert max(even.values()) - min(even.values()) < 1e-4


def test_a_mixed_batch_has_every_task_and_a_batch_of_one_task_one():
    for batch in batches(sampler()):
        assert {key[0] for key in batch} == set(SIZES)
    chosen = [{key[0] for key in batch} for batch in batches(sampler(mixed=False), epochs=20)]
    assert all(len(tasks) == 1 for tasks in chosen)
    counts = Counter(next(iter(tasks)) for tasks in chosen)
    for name, share in shares_of(SIZES, 2.0).items():
        assert counts[name] / len(chosen) == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("mixed", [True, False])
def test_every_example_comes_once_a_turn(mixed):
    seen = {name: [] for name in SIZES}
    for batch in batches(sampler(mixed=mixed), epochs=8):
        for name, _, index, draw in batch:
            assert draw == len(seen[name])
            seen[name].append(index)
    for name, indices in seen.items():
        turns = [indices[place : place + SIZES[name]] for place in range(0, len(indices), SIZES[name])]
        assert all(sorted(turn) == list(range(SIZES[name])) for turn in turns[:-1])
        assert (len(turns) > 2 and turns[0] != turns[1]) or name == "large"


@pytest.mark.parametrize("mixed", [True, False])
def test_ranks_share_a_batch_and_resumed_runs_go_on(mixed):
    whole = batches(sampler(mixed=mixed, batch_size=12), epochs=3)
    first, second = (batches(sampler(mixed=mixed, rank=rank, world_size=2), epochs=3) for rank in (0, 1))
    if not mixed:  # the rounding of a mixed batch is each rank's own
        for one, two, both in zip(first, second, whole):
            assert sorted(one + two) == sorted(both)
    for one, two in zip(first, second):
        assert Counter(key[0] for key in one) == Counter(key[0] for key in two)
        assert not {key[0::3] for key in one} & {key[0::3] for key in two}
    resumed = sampler(mixed=mixed, batch_size=12)
    resumed.set_epoch(1)
    resumed.skip = 12 * 3
    keys = list(resumed)
    assert keys == [key for batch in whole[resumed.batches + 3 : 2 * resumed.batches] for key in batch]


def test_shares_hold_over_many_batches():
    shares = {"large": 0.62, "small": 0.13, "middle": 0.25}
    found = [Counter(key[0] for key in batch) for batch in batches(sampler(shares=shares, batch_size=10), epochs=40)]
    for name, share in shares.items():
        assert sum(counts[name] for counts in found) / len(found) == pytest.approx(10 * share, abs=0.12)
        assert {counts[name] for counts in found} <= {int(10 * share), int(10 * share) + 1}
    even = batches(sampler(shares=dict.fromkeys(SIZES, 1.0), batch_size=6))
    assert all(set(Counter(key[0] for key in batch).values()) == {2} for batch in even)


def test_tasks_join_at_their_optimizer_step():
    made = sampler(starts={"small": 2, "middle": 7}, accumulate=3, limit=4)  # two steps an epoch, of three batches and of one
    assert len(made) == 4 * 6
    steps = [2 * epoch + (place == 3) for epoch in range(5) for place in range(4)]
    for step, batch in zip(steps, batches(made, epochs=5), strict=True):
        tasks = {"large"} | ({"small"} if step >= 2 else set()) | ({"middle"} if step >= 7 else set())
        assert {key[0] for key in batch} == tasks


def test_tasks_join_at_their_batch():
    found = batches(sampler(starts={"small": 4, "middle": 9}))
    for number, batch in enumerate(found):
        tasks = {"large"} | ({"small"} if number >= 4 else set()) | ({"middle"} if number >= 9 else set())
        assert {key[0] for key in batch} == tasks
