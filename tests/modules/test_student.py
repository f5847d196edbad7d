import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.pretrained import load_model
from fulgurite.modules.student import LayerChoice, StudentSpec, block_influence, build_student, choose_layers
from fulgurite.modules.tiny import tiny_model


def test_kept_layers_are_the_models_own_and_caches_fit():
    original = tiny_model()
    student = build_student(tiny_model(), StudentSpec([0, 2, 3]))
    assert student.config.num_hidden_layers == 3
    for new, old in zip(student.model.layers, (0, 2, 3)):
        assert torch.equal(new.mlp.up_proj.weight, original.model.layers[old].mlp.up_proj.weight)
    ids = torch.arange(3, 23)[None]
    whole = student(ids, use_cache=False).logits
    cached = student(ids[:, :10], use_cache=True)
    rest = student(ids[:, 10:], past_key_values=cached.past_key_values).logits
    assert torch.allclose(whole[:, 10:], rest, atol=1e-5)


def test_block_influence_equals_the_cosine_of_hidden_states():
    model = tiny_model()
    ids = torch.randint(3, 259, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states, states[1:-1])]
    measured = block_influence(model, {"input_ids": ids})
    assert torch.allclose(measured[:-1], torch.stack(expected), atol=1e-5)
    assert len(measured) == 4


def test_padding_has_no_influence():
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 60)), "lengths": torch.tensor([40])}
    assert torch.equal(block_influence(tiny_model(), padded), block_influence(tiny_model(), {"input_ids": ids}))


def test_even_choice_holds_first_and_last():
    model = tiny_model()
    for count in (2, 3, 4):
        kept = choose_layers(model, LayerChoice(count, "even"))
        assert (len(kept), kept[0], kept[-1]) == (count, 0, 3)


def test_influence_choice_drops_the_least():
    kept = choose_layers(tiny_model(), LayerChoice(2), torch.tensor([0.9, 0.1, 0.2, 0.5]))
    assert kept == [0, 3]


def test_fresh_student_is_random_and_smaller():
    student = build_student(tiny_model(), StudentSpec(fresh={"num_hidden_layers": 1, "intermediate_size": 16}))
    assert student.config.num_hidden_layers == len(student.model.layers) == 1
    assert student.model.layers[0].mlp.up_proj.weight.shape == (16, 32)


def test_fresh_student_has_the_attention_that_was_asked_for():
    model = load_model("random:tiny", attn_implementation="eager")
    student = build_student(model, StudentSpec(fresh={"num_hidden_layers": 1}))
    assert {each.config._attn_implementation for each in (model, student)} == {"eager"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StudentSpec(LayerChoice(5)), r"count=5.*1 to 4"),
        (StudentSpec(LayerChoice(0)), r"count=0"),
        (StudentSpec([0, 4]), r"\[0, 4\].*0 to 3"),
        (StudentSpec([2, 1]), r"rising"),
        (StudentSpec([]), r"keep_layers=\[\]"),
        (StudentSpec([0], {"hidden_size": 8}), "not both"),
        (StudentSpec(fresh={"hiden_size": 8}), "hidden_size"),
    ],
)
def test_impossible_students_are_refused_by_name(spec, message):
    with pytest.raises(InputError, match=message):
        build_student(tiny_model(), spec)


def test_influence_without_tokens_says_what_to_do():
    with pytest.raises(InputError, match="by='even'"):
        build_student(tiny_model(), StudentSpec(LayerChoice(2)))


def test_tiny_model_and_influence_are_the_same_where_new_tensors_stand_elsewhere():
    """As on a GPU, where Lightning has models made."""
    ids = torch.randint(3, 200, (2, 9))
    expected = block_influence(tiny_model(), {"input_ids": ids})
    with torch.device("meta"):
        found = block_influence(tiny_model(), {"input_ids": ids})
    assert torch.equal(found, expected)
