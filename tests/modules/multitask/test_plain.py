"""Exported models have the numbers of trunk and branch."""

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules import TransformerBranch
from fulgurite.modules.multitask.plain import plain_model, why_not_plain
from fulgurite.modules.multitask.trunk import trunk_of_config

from .small import DECODERS, ENCODERS, OBJECTIVES, branch_of, trunk_of, view_of


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "next") for kind in DECODERS), *((kind, name) for kind in ENCODERS for name in ("text", "tags", "number"))],
)
def test_plain_model_has_the_same_numbers(tmp_path, kind, name, layers):
    _check_plain(trunk_of(kind), name, layers, tmp_path)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_keeps_a_head_of_its_own(tmp_path, kind):
    config = trunk_of(kind).model.config
    config.tie_word_embeddings = False
    trunk = trunk_of_config(config, "float32").eval()
    assert trunk.head is not None
    assert not torch.equal(trunk.output_table, trunk.table)
    _check_plain(trunk, "next", 1, tmp_path)
    config.tie_word_embeddings = True
    assert trunk_of_config(config, "float32").head is None


def _check_plain(trunk, name, layers, tmp_path):
    objective = OBJECTIVES[name]
    branch = branch_of(trunk, objective, layers).eval()
    view = view_of(objective.mask)
    expected = branch.scores(trunk, branch.states(trunk, trunk(view), view), view)
    plain = plain_model(trunk, branch, objective)
    plain.save_pretrained(tmp_path)
    plain = type(plain).from_pretrained(tmp_path).eval()
    mask = (torch.arange(12) < view["lengths"][:, None]).long()
    found = plain(input_ids=view["input_ids"], attention_mask=mask).logits
    if name in ("next", "tags"):
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found.squeeze(-1) if name == "number" else found, expected, atol=1e-4, rtol=1e-4)
    if objective.classes:
        assert list(plain.config.id2label.values()) == list(objective.classes)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("llama", "text", "a decoder that sees both directions is no model of transformers"),
        ("llama", "masked", "a decoder that sees both directions is no model of transformers"),
        ("bert", "masked", "transformers' bert models predict a masked_token in another way"),
    ],
)
def test_what_transformers_has_not_is_refused(kind, name, reason):
    trunk, objective = trunk_of(kind), OBJECTIVES[name]
    branch = branch_of(trunk, objective)
    assert why_not_plain(trunk, branch, objective) == reason
    with pytest.raises(InputError, match="cannot be exported to transformers"):
        plain_model(trunk, branch, objective)


def test_the_mean_of_an_encoders_tokens_is_not_exported():
    trunk, objective = trunk_of("bert"), OBJECTIVES["text"]
    branch = TransformerBranch(pooling="mean")
    branch.attach(trunk, objective)
    assert why_not_plain(trunk, branch, objective) == "transformers' bert models read the first token, not the mean of all"


class Another(TransformerBranch):
    """A branch of the user's own, whose numbers no model of transformers has."""

    def states(self, trunk, features, view):
        return -super().states(trunk, features, view)


def test_branches_of_the_users_own_are_not_exported():
    trunk, objective = trunk_of("bert"), OBJECTIVES["text"]
    branch = Another()
    branch.attach(trunk, objective)
    assert why_not_plain(trunk, branch, objective) == "its branch is a Another"
