"""The exchange by itself: what is sent and kept back, between processes and in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fulgurite.callbacks.gradient_pruning.hook import GradientExchange

SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 60), st.integers(1, 60))), min_size=1, max_size=5
)

KEPT = ("residuals", "velocities")


def parameters_of(shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=draw)) for shape in shapes]


def exchange_of(parameters, **changes):
    names = {id(parameter): f"p{number}" for number, parameter in enumerate(parameters)}
    return GradientExchange(names, **{"dense_below": 16, **changes})


def kept_back(exchange, parameters):
    empty = [torch.zeros(parameter.numel()) for parameter in parameters]
    return torch.cat([exchange.residuals.get(f"p{number}", zero) for number, zero in enumerate(empty)])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.99]), min_size=1, max_size=4), st.sampled_from([None, 0.5]))
def test_sent_and_kept_back_are_the_clipped_gradient_and_what_was_kept_back(shapes, rates, clip):
    parameters = parameters_of(shapes)
    exchange = exchange_of(parameters, clip=clip)
    total = sum(parameter.numel() for parameter in parameters)
    draw = torch.Generator().manual_seed(1)
    for turn, rate in enumerate(rates):
        gradient = torch.randn(total, generator=draw)
        clipped = gradient * min(1.0, clip / float(gradient.norm())) if clip else gradient
        before = kept_back(exchange, parameters)
        exchange.rate, exchange.turn = rate, turn
        sent = exchange.exchange(gradient.clone(), parameters, total).wait()
        after = kept_back(exchange, parameters)
        torch.testing.assert_close(sent + after, clipped + before, rtol=1e-6, atol=1e-6)


def test_flush_leaves_nothing_behind():
    parameters = parameters_of([(50, 50)])
    exchange = exchange_of(parameters)
    exchange.rate = 0.9
    first = exchange.exchange(torch.ones(2500), parameters, 2500).wait().clone()
    exchange.flush = True
    second = exchange.exchange(torch.ones(2500), parameters, 2500).wait()
    assert not exchange.residuals
    torch.testing.assert_close(first + second, torch.full((2500,), 2.0))


def test_without_error_feedback_nothing_is_kept():
    parameters = parameters_of([(50, 50)])
    exchange = exchange_of(parameters, error_feedback=False)
    exchange.rate = 0.9
    sent = exchange.exchange(torch.randn(2500), parameters, 2500).wait()
    assert not exchange.residuals
    assert int((sent != 0).sum()) == 250


def test_momentum_of_what_was_sent_is_forgotten():
    parameters = parameters_of([(50, 50)])
    exchange = exchange_of(parameters, momentum=0.9)
    exchange.rate = 0.9
    sent = exchange.exchange(torch.randn(2500), parameters, 2500).wait()
    velocity = exchange.velocities["p0"]
    assert (velocity[sent != 0] == 0).all()
    assert (velocity[sent == 0] != 0).all()
    before = velocity.clone()
    gradient = torch.randn(2500)
    held = exchange.residuals["p0"].clone()
    result = exchange.exchange(gradient.clone(), parameters, 2500).wait()
    torch.testing.assert_close(result + exchange.residuals["p0"], 0.9 * before + gradient + held, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("value_bits", "all_sent"), [(4, 0.2), (16, 0.05)])
def test_momentum_goes_on_where_everything_is_sent(value_bits, all_sent):
    """A selection of all entries gives the updates of the dense exchange, but for what its rounding keeps back."""
    parameters = parameters_of([(50, 50), (7,)])
    exchanges = {rate: exchange_of(parameters, momentum=0.9, value_bits=value_bits) for rate in (0.0, all_sent)}
    sums = {rate: torch.zeros(2507) for rate in exchanges}
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        gradient = torch.randn(2507, generator=draw)
        for rate, exchange in exchanges.items():
            exchange.rate = rate
            sums[rate] += exchange.exchange(gradient.clone(), parameters, 2507).wait()
    totals = [sums[rate] + kept_back(exchange, parameters) for rate, exchange in exchanges.items()]
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(exchange.velocities["p0"] for exchange in exchanges.values()))


def test_what_is_kept_back_of_one_parameter_never_becomes_that_of_another():
    """Of branches of equal size, one process trains one a step."""
    parameters = one, two, three = parameters_of([(50, 50)] * 3)
    exchange = exchange_of(parameters)
    exchange.rate = 0.9
    exchange.exchange(torch.randn(5000), [one, two], 7500).wait()
    before = exchange.residuals["p1"].clone()
    exchange.exchange(torch.randn(5000), [one, three], 7500).wait()
    assert torch.equal(exchange.residuals["p1"], before)
    assert not torch.equal(exchange.residuals["p2"], before)


@pytest.mark.parametrize("rate", [0.0, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_is_kept_back_of_an_unused_parameter_waits(rate, momentum):
    """DDP gives its zeros to the hook, and does not apply what comes back."""
    parameters = parameters_of([(50, 50), (50, 50), (7,)])
    exchange = exchange_of(parameters, some_unused=True, momentum=momentum)
    exchange.rate = 0.9
    exchange.exchange(torch.randn(5007), parameters, 5007).wait()
    before = {kind: {name: tensor.clone() for name, tensor in getattr(exchange, kind).items()} for kind in KEPT}
    exchange.rate = rate
    gradient = torch.randn(5007)
    gradient[2500:] = 0
    sent = exchange.exchange(gradient, parameters, 5007).wait()
    assert not sent[2500:].any()
    for kind, held in before.items():
        for name in ("p1", "p2") if held else ():
            assert torch.equal(getattr(exchange, kind)[name], held[name])
    assert not torch.equal(exchange.residuals["p0"], before["residuals"]["p0"])
    last = exchange.exchange(torch.full((5007,), 1e-9), parameters, 5007).wait()
    assert last[2500:5000].abs().sum() > 1


def test_memory_of_buckets_that_are_no_more_is_given_back():
    parameters = one, two, three, four = parameters_of([(50, 50)] * 4)
    exchange = exchange_of(parameters)
    exchange.rate = 0.9
    for pairs in [((one, two), (three, four)), ((four, three), (two, one))]:
        for pair in pairs:
            exchange.exchange(torch.randn(5000), list(pair), 10000).wait()
    assert sum(memory.numel() for memory in exchange._workspaces.values()) <= 2 * 2 * (5000 + 5000 % 256 + 256)


def test_a_gradient_that_is_not_finite_does_not_poison_the_next():
    parameters = parameters_of([(50, 50)])
    exchange = exchange_of(parameters)
    exchange.rate = 0.9
    gradient = torch.randn(2500)
    gradient[::3] = float("nan")
    exchange.exchange(gradient, parameters, 2500).wait()
    sent = exchange.exchange(torch.randn(2500), parameters, 2500).wait()
    assert torch.isfinite(sent).all()


# Between processes


def _process(rank, function, count, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(function, tmp_path, *arguments, count=2):
    """Run a function on some ranks; an error on any of them is raised here."""
    if torch.cuda.is_available():
        pytest.skip("a fork has no CUDA")
    mp.start_processes(_process, args=(function, count, str(tmp_path / "store"), arguments), nprocs=count, start_method="fork")


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 50), nn.Tanh(), nn.Linear(50, 3))


def train(rank, exchange, steps, rates, model=None):
    """Train some steps by DDP; return the weights."""
    model = model or model_of()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.01)
    if exchange is not None:
        exchange.names = {id(parameter): name for name, parameter in model.named_parameters()}
        total = sum(parameter.numel() for parameter in model.parameters())

        def hook(state, bucket):
            return state.exchange(bucket.buffer(), bucket.parameters(), total)

        wrapped.register_comm_hook(exchange, hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(100 + rank)
    for step in range(steps):
        if exchange is not None:
            exchange.rate, exchange.turn = rates[step % len(rates)], step
        optimizer.zero_grad()
        wrapped(torch.randn(8, 30, generator=draw)).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _replicas(rank, count):
    weights = train(rank, GradientExchange({}, dense_below=16), 200, [0.0, 0.5, 0.9, 0.99])
    others = [torch.empty_like(weights) for _ in range(count)]
    dist.all_gather(others, weights)
    for other in others:
        assert torch.equal(weights, other)
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_are_bitwise_equal_after_200_steps_with_changing_rates(tmp_path, count):
    on_ranks(_replicas, tmp_path, count, count=count)


def _dense(rank):
    plain = train(rank, None, 20, [0.0])
    exact = train(rank, GradientExchange({}, dense_format="float32"), 20, [0.0])
    assert torch.equal(plain, exact)
    rounded = train(rank, GradientExchange({}, dense_format="float16"), 20, [0.0])
    # float16 rounds by at most 2^-11 of a value, and what it rounds off comes with the next step
    assert (plain - rounded).abs().max() < 20 * 0.05 * 2**-11
    assert not torch.equal(plain, rounded)


def test_rate_0_is_plain_ddp(tmp_path):
    on_ranks(_dense, tmp_path)


def _mean(rank):
    """What all ranks get is the mean of what they sent."""
    parameters = parameters_of([(40, 40), (7,)])
    exchange = exchange_of(parameters, value_bits=16)
    exchange.rate = 0.75
    gradient = torch.randn(1607, generator=torch.Generator().manual_seed(rank))
    result = exchange.exchange(gradient.clone(), parameters, 1607).wait()
    own = gradient - kept_back(exchange, parameters)
    total = own.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(result, total / 2, rtol=1e-6, atol=1e-6)
    assert exchange.clock.bytes == 1600 // 8 + 2 * 400 + 2 * 7
    assert exchange.clock.times()[0] > 0


def test_ranks_get_the_mean_of_what_was_sent(tmp_path):
    on_ranks(_mean, tmp_path)


def _phases(rank, count, value_bits, momentum):
    """In two phases, too, what all get and what all keep back is what all had."""
    shapes = [(40, 40), (7,), (30, 20), (3, 200)]
    parameters = parameters_of(shapes)
    total = sum(parameter.numel() for parameter in parameters)
    exchange = exchange_of(parameters, value_bits=value_bits, some_unused=True, momentum=momentum)
    draw = torch.Generator().manual_seed(rank)
    before = torch.zeros(total)
    for turn, rate in enumerate([0.5, 0.5, 0.2, 0.99, 0.5]):
        gradient = torch.randn(total, generator=draw)
        if rank == 1 and turn in (1, 2):
            gradient[:1600] = 0  # other ranks use this one
        exchange.rate, exchange.turn = rate, turn
        exchange.clock.restart()
        velocity = torch.cat([exchange.velocities.get(f"p{at}", torch.zeros(shape)).flatten() for at, shape in enumerate(shapes)])
        used = torch.ones(total)
        used[:1600] = float(gradient[:1600].any())
        had = gradient + momentum * velocity * used + before
        result = exchange.exchange(gradient.clone(), parameters, total).wait()
        before = kept_back(exchange, parameters).clone()
        sides = torch.stack([had, before + result])
        dist.all_reduce(sides)
        small = slice(1600, 1607)  # summed in float16
        torch.testing.assert_close(*sides[:, small], rtol=1e-3, atol=2e-3)
        sides[:, small] = 0
        torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-4)
        others = [torch.empty_like(result) for _ in range(count)]
        dist.all_gather(others, result)
        assert all(torch.equal(result, other) for other in others)
        if count > 2:
            assert exchange.clock.bytes == pytest.approx(exchange.bytes_at(parameters)(rate), rel=0.4)  # of whole groups
        busy, exposed = exchange.clock.times()
        assert busy >= exposed > 0
    exchange.flush = True
    result = exchange.exchange(torch.full((total,), 1e-9), parameters, total).wait()  # of zeros alone, all would be unused
    dist.all_reduce(before)
    if not momentum:
        torch.testing.assert_close(result, before / count, rtol=1e-3, atol=1e-2)
    assert not exchange.residuals


@pytest.mark.parametrize(("count", "value_bits", "momentum"), [(2, 4, 0.0), (3, 4, 0.0), (3, 16, 0.5), (4, 4, 0.0)])
def test_nothing_is_lost_between_ranks(tmp_path, count, value_bits, momentum):
    on_ranks(_phases, tmp_path, count, value_bits, momentum, count=count)


def _not_finite(rank):
    """What is not finite in the own share, which is not packed before it is summed, is seen by all, once."""
    parameters = parameters_of([(40, 40)])
    exchange = exchange_of(parameters)
    exchange.rate = 0.2
    for turn in range(3):
        gradient = torch.randn(1600)
        if turn == 0 and rank == 0:
            gradient[:512] = float("nan")  # its own share
        result = exchange.exchange(gradient, parameters, 1600).wait()
        assert bool(result.isfinite().all()) == (turn > 0)


def test_a_gradient_that_is_not_finite_is_seen_by_all_ranks(tmp_path):
    on_ranks(_not_finite, tmp_path, count=3)


def _pays(rank):
    """Nearly all entries, at 16 bits each, are as many bytes as an all-reduce of everything."""
    parameters = parameters_of([(40, 40)])
    exchange = exchange_of(parameters, value_bits=16)
    exchange.rate, exchange.ranks = 0.05, 8
    gradient = torch.randn(1600)
    exchange.exchange(gradient, parameters, 1600).wait()
    assert exchange.clock.bytes == 2 * 7 / 8 * 1600 * 2


def test_everything_is_sent_where_a_selection_would_take_more_bytes(tmp_path):
    on_ranks(_pays, tmp_path)
