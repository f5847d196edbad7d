import itertools

import pytest
import torch

from fulgurite.datamodules.loader import EpochSampler, ResumableLoader
from fulgurite.errors import InputError


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"index": index}


def collate(examples):
    return [example["index"] for example in examples]


def loader(workers=0, size=23, rank=0, world_size=1, seed=3, batch_size=4, **settings):
    sampler = EpochSampler(size, shuffle=True, even=True, seed=seed, rank=rank, world_size=world_size)
    return ResumableLoader(
        Numbers(size), sampler=sampler, batch_size=batch_size, collate=collate, num_workers=workers, **settings
    )


def epoch(made, number):
    iterator = iter(made)
    made.sampler.set_epoch(number)  # as Lightning does it: after the iterator is made
    return list(iterator)


def test_order_depends_on_seed_epoch_and_rank_only():
    assert epoch(loader(), 0) == epoch(loader(), 0)
    assert epoch(loader(), 0) != epoch(loader(), 1)
    assert epoch(loader(seed=3), 0) != epoch(loader(seed=4), 0)
    ranks = [list(itertools.chain(*epoch(loader(rank=rank, world_size=2), 5))) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 11
    assert not set(ranks[0]) & set(ranks[1])


def grouped(rank=0, world_size=1, shuffle=True):
    """Batches of four examples whose lengths are a permutation of 0 to 200."""
    lengths = [index * 37 % 201 for index in range(201)]
    sampler = EpochSampler(
        201, shuffle=shuffle, even=shuffle, seed=3, rank=rank, world_size=world_size, lengths=lengths, batch_size=4
    )
    order = list(sampler)
    return order, [[lengths[index] for index in order[start : start + 4]] for start in range(0, len(order) // 4 * 4, 4)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_like_length_have_every_example_once_in_mixed_order(shuffle):
    order, batches = grouped(shuffle=shuffle)
    assert sorted(order) == list(range(201))
    assert grouped(shuffle=shuffle)[0] == order
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 12
    firsts = [batch[0] for batch in batches]
    assert sorted(firsts) != firsts
    assert abs(sum(firsts[:25]) / 25 - 100) < 40  # a beginning is no choice of short ones


def test_batches_of_like_length_are_so_on_all_ranks_together():
    parts = [grouped(rank, 2) for rank in range(2)]
    assert not set(parts[0][0]) & set(parts[1][0])
    for one, two in zip(*(batches for _, batches in parts)):
        assert max(one + two) - min(one + two) < 30


def test_evaluation_sees_every_example_once():
    samplers = [EpochSampler(23, shuffle=False, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(itertools.chain(*samplers)) == list(range(23))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_resumes_in_the_middle_of_an_epoch(workers, done):
    whole = epoch(loader(), 2)
    interrupted = loader(workers)
    iterator = iter(interrupted)
    interrupted.sampler.set_epoch(2)
    before = list(itertools.islice(iterator, done))
    state = interrupted.state_dict()
    resumed = loader(workers)
    resumed.load_state_dict(state)
    if done == len(whole):  # the epoch was over
        assert epoch(resumed, 3) == epoch(loader(), 3)
        return
    assert before + epoch(resumed, 2) == whole
    assert epoch(resumed, 3) == epoch(loader(), 3)


@pytest.mark.parametrize(
    ("change", "name"), [({"size": 24}, "examples"), ({"batch_size": 2}, "batch_size"), ({"seed": 9}, "seed")]
)
def test_changed_data_is_refused(change, name):
    state = loader().state_dict()
    with pytest.raises(InputError, match=name):
        loader(**change).load_state_dict(state)
