"""A model in parts gives the numbers of the whole, to the bit."""

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import ModelPart, Prefix, PrefixSettings, behind_prefix, plugged_in, with_virtual, without_virtual

from ..span_attention.small import KINDS, ids_of, model_of

CUT, LENGTH = 1, 3


def parts_of(architecture):
    whole = model_of(architecture)
    layers = len(whole.model.layers)
    return whole, ModelPart(model_of(architecture), 0, CUT), ModelPart(model_of(architecture), CUT, layers)


@pytest.mark.parametrize("kind", ["prompts", "key_values"])
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_forward_and_backward_through_parts_are_those_of_the_whole_to_the_bit(architecture, kind):
    whole, first, rest = parts_of(architecture)
    layers = len(whole.model.layers)
    for model in (whole, first, rest):
        model.requires_grad_(False)
    prefix = Prefix.random(whole, PrefixSettings(kind, LENGTH))
    batch = behind_prefix({"input_ids": ids_of(2, 9), "position_ids": torch.arange(9).expand(2, -1)}, LENGTH)
    direction = torch.randn(2, 9, whole.config.vocab_size, generator=torch.Generator().manual_seed(1))
    with plugged_in(whole, prefix):
        expected = whole(**batch, use_cache=False).logits[:, LENGTH:]
        (expected * direction).sum().backward()
    gradients = [one.grad.clone() for one in prefix.rows]
    prefix.zero_grad()
    with plugged_in(first.body, prefix.within(0, CUT)), plugged_in(rest.body, prefix.within(CUT, layers)):
        sent = without_virtual(first(batch["input_ids"], position_ids=batch["position_ids"]), LENGTH)
        back = rest(with_virtual(sent, LENGTH), position_ids=batch["position_ids"])
        found = rest.logits(without_virtual(back, LENGTH))
        (found * direction).sum().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(one.grad, other) for one, other in zip(prefix.rows, gradients))


@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_tokens_one_by_one_through_parts_with_caches(architecture):
    whole, first, rest = parts_of(architecture)
    ids = ids_of(1, 12)
    caches = [first.new_cache(), rest.new_cache()]
    rows = []
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
        for seen, count in ((0, 7), *((place, 1) for place in range(7, 12))):
            positions = torch.arange(seen, seen + count)[None]
            states = first(ids[:, seen : seen + count], position_ids=positions, cache=caches[0])
            rows.append(rest.logits(rest(states, position_ids=positions, cache=caches[1])))
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, atol=1e-5, rtol=1e-4)


def test_what_is_no_part_is_refused():
    with pytest.raises(InputError, match="Layers 2 to 98 are no part of a model of"):
        ModelPart(model_of("llama"), 2, 99)
    first = ModelPart(model_of("llama"), 0, 1)
    with pytest.raises(InputError, match="are not the last part: it has no head"):
        first.logits(torch.zeros(1, 1, 32))
