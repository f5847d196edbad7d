import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.modules.distillation.labels import LabelSettings, SoftLabels, select_labels
from fulgurite.modules.distillation.loss import FullVocabularyTargets, KeptLabelTargets
from fulgurite.modules.linear_loss import linear_log_likelihood, linear_loss, shift_labels

TOKENS, HIDDEN, VOCABULARY = 13, 8, 37


def problem(seed=0, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    teacher = torch.randn(tokens, vocabulary, generator=generator) * 2
    return states, weight, labels, teacher


def slow_divergence(p, q, name):
    p, q = p.clamp(min=1e-300), q.clamp(min=1e-300)
    if name == "forward_kl":
        return (p * (p / q).log()).sum(1)
    if name == "reverse_kl":
        return (q * (q / p).log()).sum(1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2


def slow_loss(states, weight, labels, soft_weight, temperature, p_kept, ids, tail, divergence):
    """The loss as the paper writes it, in float64 by autograd, with full logits."""
    logits = states.double() @ weight.double().t()
    hard = torch.nn.functional.cross_entropy(logits, labels)
    q = (logits / temperature).softmax(1)
    q_kept = q.gather(1, ids)
    p = torch.cat([p_kept, tail[:, None]], 1).double()
    q_all = torch.cat([q_kept, 1 - q_kept.sum(1, keepdim=True)], 1)
    soft = slow_divergence(p, q_all, divergence).mean()
    return (1 - soft_weight) * hard + soft_weight * temperature**2 * soft, hard, soft


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@given(
    tokens=st.integers(1, 20),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(2, 50),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_hard_loss_equals_cross_entropy_of_full_logits(tokens, hidden, vocabulary, chunk, seed):
    states, weight, labels, _ = problem(seed, tokens, hidden, vocabulary)
    parts = linear_loss(states, weight, labels, chunk_tokens=chunk)
    slow = torch.nn.functional.cross_entropy(states.double() @ weight.double().t(), labels)
    assert torch.allclose(parts.loss.double(), slow, atol=1e-5)
    for fast, exact in zip(gradients(parts.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(fast, exact, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("divergence", "remainder"),
    [
        ("forward_kl", "tail_bucket"),
        ("reverse_kl", "tail_bucket"),
        ("jensen_shannon", "tail_bucket"),
        ("forward_kl", "renormalize"),
        ("jensen_shannon", "renormalize"),
    ],
)
def test_kept_labels_equal_the_slow_reference(divergence, remainder, temperature):
    states, weight, labels, teacher = problem()
    p = (teacher / temperature).softmax(1)
    top = p.topk(6, dim=1)
    kept = top.values.bfloat16()
    tail = (1 - top.values.sum(1)).bfloat16()
    soft_labels = SoftLabels(top.indices.int(), kept, tail, tail, temperature)
    parts = linear_loss(
        states, weight, labels, soft_targets=KeptLabelTargets(soft_labels, divergence, remainder), soft_weight=0.3, chunk_tokens=5
    )
    kept, tail = kept.double(), tail.double() * (remainder == "tail_bucket")
    total = kept.sum(1) + tail
    slow, hard, soft = slow_loss(
        states, weight, labels, 0.3, temperature, kept / total[:, None], top.indices, tail / total, divergence
    )
    assert torch.allclose(parts.loss.double(), slow, atol=1e-5)
    assert torch.allclose(parts.hard.double(), hard, atol=1e-5)
    assert torch.allclose(parts.soft.double(), soft, atol=1e-5)
    for fast, exact in zip(gradients(parts.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(fast, exact, atol=2e-5)


def test_text_in_the_tail_equals_the_slow_reference():
    states, weight, labels, teacher = problem()
    log_p = teacher.log_softmax(1)
    top = log_p.exp().topk(6, dim=1)
    kept, tail = top.values.bfloat16(), (1 - top.values.sum(1)).bfloat16()
    realised = log_p.gather(1, labels[:, None])[:, 0].bfloat16()
    soft_labels = SoftLabels(top.indices.int(), kept, tail, realised)
    targets = KeptLabelTargets(soft_labels, remainder="text_tail", text=labels)
    parts = linear_loss(states, weight, labels, soft_targets=targets, soft_weight=0.3, chunk_tokens=5)
    total = (kept.double().sum(1) + tail.double())[:, None]
    slow, _, soft = slow_loss(
        states, weight, labels, 0.3, 1.0, kept.double() / total, top.indices, (tail.double() / total[:, 0]), "forward_kl"
    )
    q = (states.double() @ weight.double().t()).softmax(1)
    outside = (top.indices != labels[:, None]).all(1)
    assert 0 < int(outside.sum()) < TOKENS
    rest = 1 - q.gather(1, top.indices).sum(1)
    within = realised.double() - tail.double().log() - (q.gather(1, labels[:, None])[:, 0] / rest).log()
    slow, soft = slow + 0.3 * (within * outside).mean(), soft + (within * outside).mean()
    assert torch.allclose(parts.soft.double(), soft, atol=1e-5)
    assert torch.allclose(parts.loss.double(), slow, atol=1e-5)
    for fast, exact in zip(gradients(parts.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(fast, exact, atol=2e-5)


def test_text_in_the_tail_is_the_whole_distribution_on_average():
    states, weight, labels, teacher = problem()
    p = teacher.softmax(1)
    identity = torch.eye(VOCABULARY)
    total = torch.zeros_like(states)
    for token in range(VOCABULARY):  # the text, weighted by how likely the teacher finds it
        text = torch.full((TOKENS,), token)
        kept = select_labels(teacher, identity, text, LabelSettings(k=5), dtype=torch.float32)
        targets = KeptLabelTargets(kept, remainder="text_tail", text=text)
        for row in range(TOKENS):
            one = KeptLabelTargets(targets.labels.where(slice(row, row + 1)), remainder="text_tail", text=text[:1])
            loss = linear_loss(states[row : row + 1], weight, labels[row : row + 1], soft_targets=one, soft_weight=1.0).loss
            total += float(p[row, token]) * gradients(loss, states)[0]
    whole = linear_loss(states, weight, labels, soft_targets=FullVocabularyTargets(teacher, identity), soft_weight=1.0).loss
    assert torch.allclose(total, TOKENS * gradients(whole, states)[0], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_full_vocabulary_equals_the_slow_reference(divergence, temperature):
    states, weight, labels, _ = problem()
    teacher_states, teacher_weight = torch.randn(TOKENS, 5), torch.randn(VOCABULARY, 5)
    targets = FullVocabularyTargets(teacher_states, teacher_weight, divergence, temperature)
    parts = linear_loss(states, weight, labels, soft_targets=targets, soft_weight=0.7, chunk_tokens=4)
    p = (teacher_states.double() @ teacher_weight.double().t() / temperature).softmax(1)
    every = torch.arange(VOCABULARY).expand(TOKENS, -1)
    logits = states.double() @ weight.double().t()
    soft = slow_divergence(p, (logits / temperature).softmax(1), divergence).mean()
    slow = 0.3 * torch.nn.functional.cross_entropy(logits, labels) + 0.7 * temperature**2 * soft
    assert torch.allclose(parts.loss.double(), slow, atol=1e-5)
    assert every.shape == p.shape
    for fast, exact in zip(gradients(parts.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(fast, exact, atol=2e-5)


def test_padding_of_ragged_labels_changes_nothing():
    states, weight, labels, teacher = problem()
    p = teacher.softmax(1)
    top = p.topk(4, dim=1)
    ids, kept = top.indices.int().clone(), top.values.bfloat16().clone()
    ids[::2, 2:], kept[::2, 2:] = -1, 0
    tail = (1 - kept.float().sum(1)).bfloat16()
    padded = SoftLabels(torch.nn.functional.pad(ids, (0, 3), value=-1), torch.nn.functional.pad(kept, (0, 3)), tail, tail)
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        values = [
            linear_loss(states, weight, labels, soft_targets=KeptLabelTargets(given_labels, divergence), soft_weight=1.0)
            for given_labels in (SoftLabels(ids, kept, tail, tail), padded)
        ]
        assert torch.isfinite(values[0].loss)
        assert torch.allclose(values[0].loss, values[1].loss, atol=1e-6)
        for one, other in zip(*(gradients(value.loss, states, weight) for value in values)):
            assert torch.allclose(one, other, atol=1e-6)


def test_keeping_everything_equals_the_full_vocabulary():
    states, weight, labels, _ = problem()
    teacher_states, teacher_weight = torch.randn(TOKENS, 5), torch.randn(VOCABULARY, 5)
    kept = select_labels(teacher_states, teacher_weight, labels, LabelSettings(k=VOCABULARY))
    sparse = linear_loss(states, weight, labels, soft_targets=KeptLabelTargets(kept), soft_weight=1.0)
    full = linear_loss(
        states, weight, labels, soft_targets=FullVocabularyTargets(teacher_states, teacher_weight), soft_weight=1.0
    )
    assert abs(float(sparse.soft - full.soft)) < 0.01  # bfloat16 rounding of the kept probabilities
    assert sparse.agreement == full.agreement


def test_gradient_of_sampled_labels_is_that_of_the_whole_distribution_on_average():
    states, weight, labels, teacher = problem()
    identity = torch.eye(VOCABULARY)  # states of the teacher are its logits
    sampled = LabelSettings(selection="sampled", theta=0.2)
    total, chances = torch.zeros_like(states), (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for chance in chances:
        kept = select_labels(teacher, identity, labels, sampled, chances=chance.expand(TOKENS, 1))
        parts = linear_loss(states, weight, labels, soft_targets=KeptLabelTargets(kept), soft_weight=0.7)
        total += gradients(parts.loss, states)[0]
    whole = FullVocabularyTargets(teacher, identity)
    expected = gradients(linear_loss(states, weight, labels, soft_targets=whole, soft_weight=0.7).loss, states)[0]
    assert torch.allclose(total / 1000, expected, atol=5e-4)


@pytest.mark.parametrize("width", [1, 5, VOCABULARY])
def test_universal_logit_distillation_equals_the_sorted_difference(width):
    states, weight, labels, teacher = problem()
    p = teacher.softmax(1).sort(dim=1, descending=True).values.bfloat16()
    tail = (1 - p[:, :width].float().sum(1)).clamp(min=0).bfloat16()
    unknown = torch.full((TOKENS, width), 10**6, dtype=torch.int32)  # ids of another vocabulary, which it must not read
    kept = SoftLabels(unknown, p[:, :width], tail, torch.zeros(TOKENS).bfloat16())
    parts = linear_loss(states, weight, labels, soft_targets=KeptLabelTargets(kept, "uld"), soft_weight=0.4, chunk_tokens=5)
    logits = states.double() @ weight.double().t()
    q = logits.softmax(1).sort(dim=1, descending=True).values
    whole = torch.cat([p[:, :width].double(), tail.double()[:, None].clamp(min=1e-7)], 1)
    whole = whole / whole.sum(1, keepdim=True)
    mine = torch.cat([q[:, :width], 1 - q[:, :width].sum(1, keepdim=True)], 1)
    slow = 0.6 * torch.nn.functional.cross_entropy(logits, labels) + 0.4 * (whole - mine).abs().sum(1).mean()
    assert torch.allclose(parts.loss.double(), slow, atol=1e-5)
    for ours, theirs in zip(gradients(parts.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_log_likelihood_equals_log_softmax(chunk):
    states, weight, labels, _ = problem()
    found = linear_log_likelihood(states, weight, labels, chunk_tokens=chunk)
    slow = (states.double() @ weight.double().t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(found.double(), slow, atol=1e-5)
    factors = torch.linspace(-1, 2, TOKENS)
    for ours, theirs in zip(
        gradients((found * factors).sum(), states, weight), gradients((slow * factors).sum(), states, weight)
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert gradients(linear_log_likelihood(states, weight.detach(), labels).sum(), states)[0].shape == states.shape


def test_bf16_autocast_and_tied_weights_give_nearly_the_same_gradient():
    states, weight, labels, _ = problem(tokens=64, hidden=32, vocabulary=128)
    exact = gradients(linear_loss(states, weight, labels).loss, states, weight)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = torch.nn.functional.embedding(labels, weight) * 0.5 + states
        tied = linear_loss(embedded, weight, labels, chunk_tokens=16)
        rough = linear_loss(states, weight, labels, chunk_tokens=16)
    for one, other in zip(gradients(rough.loss, states, weight), exact):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.02 * float(other.abs().max()))
    slow = torch.nn.functional.cross_entropy((torch.nn.functional.embedding(labels, weight) * 0.5 + states) @ weight.t(), labels)
    for one, other in zip(gradients(tied.loss, states, weight), gradients(slow, states, weight)):
        assert torch.allclose(one, other, atol=0.03 * float(other.abs().max()))


def test_frozen_head_and_frozen_states_get_no_gradient():
    states, weight, labels, _ = problem()
    loss = linear_loss(states, weight.detach(), labels).loss
    assert torch.allclose(gradients(loss, states)[0], gradients(linear_loss(states, weight, labels).loss, states)[0])
    loss = linear_loss(states.detach(), weight, labels).loss
    assert gradients(loss, weight)[0].shape == weight.shape


def test_second_backward_is_refused():
    states, weight, labels, _ = problem()
    loss = linear_loss(states, weight, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_gradient_scales_with_the_outer_factor():
    states, weight, labels, _ = problem()
    once = gradients(linear_loss(states, weight, labels).loss, weight)[0]
    scaled = gradients(linear_loss(states, weight, labels).loss * 0.25, weight)[0]
    assert torch.allclose(scaled, once / 4)


def test_without_gradients_only_the_loss_is_made():
    states, weight, labels, _ = problem()
    with torch.no_grad():
        parts = linear_loss(states, weight, labels)
    assert not parts.loss.requires_grad
    assert parts.tokens == TOKENS


def test_shift_labels():
    assert shift_labels(torch.tensor([[5, 6, -100, 7]])).tolist() == [[6, -100, 7, -100]]
