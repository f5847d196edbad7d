"""What each token sees, through trunk and branch."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from fulgurite.errors import InputError
from fulgurite.modules.multitask import Trunk
from fulgurite.modules.multitask.trunk import check_trunk, visible

from .small import DECODERS, ENCODERS, OBJECTIVES, base_of, branch_of, trunk_of, view_of


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_no_future_token_reaches_a_generation_branch(kind, layers, attention):
    """The gradient of output t with respect to inputs after t is zero, through trunk and branch."""
    trunk = trunk_of(kind, attn_implementation=attention)
    branch = branch_of(trunk, OBJECTIVES["next"], layers).eval()
    view = view_of("causal", rows=1, length=10)
    inputs = []
    trunk.model.get_input_embeddings().register_forward_hook(lambda module, args, out: inputs.append(out) or None)
    states = branch.states(trunk, trunk(view), view)
    for place in range(10):
        (gradient,) = torch.autograd.grad(
            branch.scores(trunk, states, view)[0, place].square().sum(), inputs[0], retain_graph=True
        )
        assert gradient[0, place + 1 :].abs().sum() == 0
        assert (gradient[0, : place + 1].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_every_token_reaches_an_understanding_branch_but_padding(kind, pooling):
    trunk = trunk_of(kind)
    branch = branch_of(trunk, OBJECTIVES["text"], pooling=pooling)
    view = view_of("bidirectional", rows=2)
    length = int(view["lengths"][1])
    before = branch.scores(trunk, branch.states(trunk, trunk(view), view), view)
    other = {**view, "input_ids": view["input_ids"].clone()}
    other["input_ids"][1, length:] = 7  # padding
    torch.testing.assert_close(branch.scores(trunk, branch.states(trunk, trunk(other), other), other), before)
    for place in range(length):
        other["input_ids"] = view["input_ids"].clone()
        other["input_ids"][1, place] += 1
        found = branch.scores(trunk, branch.states(trunk, trunk(other), other), other)
        torch.testing.assert_close(found[0], before[0])
        assert not torch.allclose(found[1], before[1])


def test_documents_of_a_packed_row_do_not_see_each_other():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    found = visible("bidirectional", positions)[0, 0]
    assert found[:3, :3].all()
    assert found[3:, 3:].all()
    assert not found[:3, 3:].any()
    assert not found[3:, :3].any()
    causal = visible("causal", positions, torch.tensor([4]))[0, 0]
    assert causal[:4, :4].equal(torch.ones(4, 4, dtype=torch.bool).tril() & found[:4, :4])
    assert causal[4].nonzero().flatten().tolist() == [3, 4]  # padding sees itself, so that no row of the softmax is empty


@pytest.mark.parametrize("kind", DECODERS)
def test_fresh_layers_of_a_decoder_change_nothing_at_first(kind):
    trunk = trunk_of(kind)
    view = view_of("causal", padded=False)
    features = trunk(view)
    bare, deep = (trunk.through(trunk.new_layers(count).eval(), features, view) for count in (0, 2))
    if kind != "gemma3":  # its norms behind what a layer writes leave nothing at zero
        torch.testing.assert_close(deep, bare)
    plain = base_of(kind).eval()  # with its last norm
    expected = plain(input_ids=view["input_ids"], position_ids=view["position_ids"], use_cache=False).last_hidden_state
    torch.testing.assert_close(bare, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_reads_as_it_does_alone(kind):
    view = view_of("bidirectional")
    mask = (torch.arange(12) < view["lengths"][:, None]).long()
    expected = base_of(kind).eval()(input_ids=view["input_ids"], attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(trunk_of(kind)(view)[real], expected[real], atol=1e-5, rtol=1e-4)


def test_other_architectures_are_refused_by_name():
    with pytest.raises(InputError, match="a gpt2 model cannot be the shared trunk. Legal: decoders"):
        check_trunk(GPT2Config())
    with pytest.raises(InputError, match="source: the model has attention spans"):
        check_trunk(LlamaConfig(span_plan={}))
    assert isinstance(trunk_of("llama"), Trunk)


def test_only_encoders_have_as_many_positions_as_their_table():
    found = {kind: trunk_of(kind).most_tokens for kind in ("llama", "bert", "roberta")}
    assert found == {"llama": None, "bert": 70, "roberta": 68}  # RoBERTa's first position is that behind the padding's id
    for kind in ("bert", "roberta"):
        trunk = trunk_of(kind)
        assert trunk(view_of("bidirectional", length=trunk.most_tokens, padded=False)).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            trunk(view_of("bidirectional", length=trunk.most_tokens + 1, padded=False))
