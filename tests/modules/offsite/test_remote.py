"""A split model at a party: the numbers of the unsplit one, whatever is kept where, and also when the owner forgets."""

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import ModelPart, Prefix, PrefixSettings, behind_prefix, plugged_in
from fulgurite.modules.offsite.owner import HeadRequest, OwnerLayers, UnknownStep
from fulgurite.modules.offsite.remote import LocalOwner, OwnersHead, OwnersLayers, split_model
from fulgurite.modules.offsite.texts import OwnerTexts

from ..span_attention.small import KINDS, ids_of, model_of

CUT, LENGTH, LAYERS = 1, 3, 3
ROWS = {"all": None, "party's": (0,), "not the owner's first": (0, 2), "not the owner's last": (0, 1), "the owner's first": (1,)}


def owner_of(architecture, **settings):
    return LocalOwner(OwnerLayers(ModelPart(model_of(architecture), CUT, LAYERS), **settings))


def split_of(architecture, prefix, owner):
    """A party's model, its prefix in place."""
    theirs = prefix.within(CUT, LAYERS)
    owners = OwnersLayers(owner, LAYERS - CUT, LENGTH, theirs if len(theirs.rows) else None)
    return split_model(model_of(architecture).requires_grad_(False), CUT, owners), owners


def batch_of(number=0, rows=2, tokens=7):
    return behind_prefix({"input_ids": ids_of(rows, tokens) + number}, LENGTH)["input_ids"]


def states_of(model, ids):
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, LENGTH:]


def gradients(model, prefix, own, batches, owners=None):
    """The states of some batches, and the rows' gradients of all of them."""
    prefix.zero_grad()
    found = []
    with plugged_in(model, own):
        for ids in batches:
            found.append(states_of(model, ids))
            found[-1].square().sum().backward()
    if owners is not None:
        owners.steps.collect()
    return [one.detach() for one in found] + [rows.grad for rows in prefix.rows]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["prompts", "key_values"])
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_training_is_that_of_the_unsplit_model_to_the_bit(architecture, kind, rows):
    whole = model_of(architecture).requires_grad_(False)
    prefix = Prefix.random(whole, PrefixSettings(kind, LENGTH, ROWS[rows]))
    batches = [batch_of(0), batch_of(1)]
    expected = gradients(whole, prefix, prefix, batches)
    split, owners = split_of(architecture, prefix, owner_of(architecture))
    stand_in = ("all", "not the owner's last", "the owner's first") if kind == "prompts" else ("all",)
    assert owners.sends_virtual_states == (rows not in stand_in)
    found = gradients(split, prefix, prefix.within(0, CUT), batches, owners)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_rows_of_the_owner_alone_are_trained_too():
    whole = model_of("llama").requires_grad_(False)
    prefix = Prefix.random(whole, PrefixSettings("prompts", LENGTH, (1, 2)))
    expected = gradients(whole, prefix, prefix, [batch_of()])
    split, owners = split_of("llama", prefix, owner_of("llama"))
    found = gradients(split, prefix, prefix.within(0, CUT), [batch_of()], owners)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Forgetful:
    """An owner that is restarted before some of its calls."""

    def __init__(self, restarts):
        self.owner, self.calls, self.restarts = owner_of("llama"), 0, restarts

    def __getattr__(self, name):
        call = getattr(self.owner, name)

        def counted(*given, **named):
            self.calls += 1
            if self.calls in self.restarts:
                self.owner = owner_of("llama")
                return getattr(self.owner, name)(*given, **named)
            return call(*given, **named)

        return counted


@pytest.mark.parametrize("restart", range(1, 11))
def test_an_owner_that_was_restarted_costs_no_step(restart):
    prefix = Prefix.random(model_of("llama"), PrefixSettings(length=LENGTH))
    found = []
    for restarts in ((), (restart, restart + 2)):
        split, owners = split_of("llama", prefix, Forgetful(restarts))
        found.append(gradients(split, prefix, prefix.within(0, CUT), [batch_of(0), batch_of(1)], owners))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_owner_that_forgets_every_time_is_given_up():
    prefix = Prefix.random(model_of("llama"), PrefixSettings(length=LENGTH))
    split, _ = split_of("llama", prefix, Forgetful(range(2, 10_000)))
    with pytest.raises(UnknownStep):
        gradients(split, prefix, prefix.within(0, CUT), [batch_of()])


def test_a_new_step_begins_when_rows_have_changed_and_only_then():
    prefix = Prefix.random(model_of("llama"), PrefixSettings(length=LENGTH))
    split, owners = split_of("llama", prefix, owner_of("llama"))
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.1)
    numbers = []
    for _ in range(2):
        for _ in range(2):
            gradients(split, prefix, prefix.within(0, CUT), [batch_of()])
            numbers.append(owners.steps._step)
        owners.steps.collect()
        with torch.no_grad(), plugged_in(split, prefix.within(0, CUT)):
            states_of(split, batch_of())  # evaluation between collecting and stepping is of the same rows
        numbers.append(owners.steps._step)
        optimizer.step()
    first, second = numbers[0], numbers[0] + 1
    assert numbers == [first] * 3 + [second] * 3


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("candidates", [None, [5, 9, 40]])
def test_a_head_at_the_owner_gives_the_same_loss_and_gradients(candidates, told):
    whole = model_of("llama").requires_grad_(False)
    prefix = Prefix.random(whole, PrefixSettings(length=LENGTH))
    ids, places = batch_of(), torch.tensor([[0, 2], [1, 6], [1, 1]])
    columns = None if candidates is None else torch.tensor(candidates)
    labels = torch.tensor([2, 0, 1])
    with plugged_in(whole, prefix):
        logits = whole.lm_head(states_of(whole, ids))[places[:, 0], places[:, 1]]
    logits = logits if columns is None else logits[:, columns]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    expected = [logits.detach(), *(rows.grad for rows in prefix.rows)]

    prefix.zero_grad()
    split, owners = split_of("llama", prefix, owner_of("llama"))
    owners.request = HeadRequest(places, columns, labels if told and columns is None else None)
    with plugged_in(split, prefix.within(0, CUT)):
        states_of(split, ids)
    answer = owners.answer
    if owners.request.labels is None:
        torch.nn.functional.cross_entropy(answer, labels).backward()
    else:
        assert answer.shape == (3,)
        answer.mean().backward()
        answer = expected[0]
    owners.steps.collect()
    for one, other in zip([answer, *(rows.grad for rows in prefix.rows)], expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["prompts", "key_values"])
@pytest.mark.parametrize("head", ["party", "owner"])
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_text_is_written_as_by_the_unsplit_model(architecture, head, kind, rows):
    whole = model_of(architecture)
    prefix = Prefix.random(whole, PrefixSettings(kind, LENGTH, ROWS[rows]))
    ids = batch_of(rows=1)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with plugged_in(whole, prefix):
        expected = whole.generate(ids, **settings)
    owner = Forgetful((4, 9)) if architecture == "llama" else owner_of(architecture)
    split, owners = split_of(architecture, prefix, owner)
    if head == "owner":
        owners.top = 1
        split.set_output_embeddings(OwnersHead(owners, split.config.vocab_size))
    with plugged_in(split, prefix.within(0, CUT)):
        assert torch.equal(split.generate(ids, **settings), expected)
        assert torch.equal(split.generate(ids, **settings), expected)
    with pytest.raises(InputError, match="2 texts at once cannot be written"):
        split.generate(batch_of(), max_new_tokens=2)


def test_texts_are_bounded_and_their_calls_may_be_repeated():
    texts = OwnerTexts(owner_of("llama").layers, most_texts=2, most_tokens=5)
    states = torch.randn(1, 2, 48)
    for number in range(3):
        texts.open("a", number, 0, None)
    texts.open("b", 0, 0, None)
    with pytest.raises(UnknownStep, match="text=0 was not begun, or is forgotten"):
        texts.extend("a", 0, 0, states)
    first = texts.extend("a", 1, 0, states)["states"]
    assert torch.equal(texts.extend("a", 1, 0, states)["states"], first)
    with pytest.raises(UnknownStep, match="text=1 has 2 tokens here, not 3"):
        texts.extend("a", 1, 3, states)
    second = texts.extend("a", 1, 2, states)["states"]
    assert torch.equal(texts.extend("a", 1, 2, states)["states"], second)
    with pytest.raises(InputError, match="longer than the owner's limit of 5"):
        texts.extend("a", 1, 4, states)
    found = texts.extend("b", 0, 0, states, top=3)
    assert found["ids"].shape == found["logits"].shape == (3,)
    with pytest.raises(UnknownStep):  # another question about the same place
        texts.extend("b", 0, 0, states, top=2)
    for bad, match in ((torch.zeros(2, 1, 48), "have the shape"), (torch.zeros(1, 1, 5), "have the shape")):
        with pytest.raises(InputError, match=match):
            texts.extend("b", 0, 2, bad)
    with pytest.raises(InputError, match="top=99 is no number of ids"):
        texts.extend("b", 0, 2, states, top=99)
    with pytest.raises(InputError, match="most_texts=0 leaves no text"):
        OwnerTexts(texts.layers, most_texts=0)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (HeadRequest(torch.tensor([[0, 9]])), "positions have to be within .2, 7., no more than there are"),
        (HeadRequest(torch.tensor([[0, 1]]), torch.tensor([61])), "candidates below 61"),
        (HeadRequest(torch.tensor([[0, 1]]), None, torch.tensor([1, 2])), "labels below 61, as many as positions"),
        (HeadRequest(torch.tensor([[0, 1]]), torch.tensor([3, 4]), torch.tensor([2])), "labels below 2, as many as"),
        (HeadRequest(torch.zeros(15, 2, dtype=torch.int64), torch.tensor([3])), "no more than there are"),
        (HeadRequest(torch.tensor([[0, 1]]), torch.zeros(62, dtype=torch.int64)), "candidates below 61, no more than that"),
        (HeadRequest(torch.zeros(3, 2, dtype=torch.int64)), "3 positions with 61 logits each are more than .* limit of 100"),
    ],
)
def test_what_a_head_cannot_answer_is_refused(request_, match):
    owner = owner_of("llama", most_logits=100)
    owner.begin(0, 0, None)
    with pytest.raises(InputError, match=match):
        owner.forward(0, 0, torch.randn(2, 7, 48), request_)


def test_a_cut_that_is_none_is_refused():
    with pytest.raises(InputError, match="cut=9: the emulator has 3 layers"):
        split_model(model_of("llama"), 9, OwnersLayers(owner_of("llama"), LAYERS - CUT))
