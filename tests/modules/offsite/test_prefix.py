"""Prefixes: a text that stands before another, learnt rows, their file, and their way from an emulator to the full model."""

import json

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import Prefix, PrefixSettings, StandsFor, behind_prefix, carried_over, plugged_in

from ..span_attention.small import KINDS, ids_of, model_of

LENGTH = 5
BOTH = pytest.mark.parametrize("kind", ["prompts", "key_values"])


def prefix_of(model, kind="prompts", layers=None):
    """A prefix that says what a text says, and that text."""
    ids = ids_of(1, LENGTH)[0]
    return Prefix.of_text(model, PrefixSettings(kind, LENGTH, layers), ids), ids


def logits(model, prefix, ids, **more):
    batch = behind_prefix({"input_ids": ids, **more}, LENGTH)
    with plugged_in(model, prefix):
        return model(**batch, use_cache=False).logits[:, LENGTH:]


@BOTH
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_a_prefix_of_a_text_is_that_text(architecture, kind):
    model = model_of(architecture)
    prefix, before = prefix_of(model, kind)
    ids = ids_of(3, 12)
    whole = torch.cat([before.expand(3, -1), ids], dim=1)
    with torch.no_grad():
        expected = model(whole, use_cache=False).logits[:, LENGTH:]
        torch.testing.assert_close(logits(model, prefix, ids), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(AssertionError):  # and nothing of it is left behind
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


@BOTH
def test_generate_goes_on_behind_a_prefix_with_padding_on_the_left(kind):
    model = model_of("llama")
    prefix, before = prefix_of(model, kind)
    ids = ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with plugged_in(model, prefix):
        found = model.generate(**behind_prefix({"input_ids": ids, "attention_mask": mask}, LENGTH), **settings)
    for row, padding in ((0, 4), (1, 0)):
        whole = torch.cat([before, ids[row, padding:]])[None]
        expected = model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **settings)
        assert torch.equal(found[row, LENGTH + 9 :], expected[0, whole.shape[1] :])


@BOTH
def test_gradients_reach_every_row_and_no_weight_also_with_checkpointing(kind):
    model = model_of("llama").requires_grad_(False).train()
    prefix, _ = prefix_of(model, kind)
    ids = ids_of(2, 8)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = {"labels": ids, "position_ids": torch.arange(8).expand(2, -1)}
        given = behind_prefix({"input_ids": ids, **batch}, LENGTH)
        assert bool((given["labels"][:, :LENGTH] == -100).all())
        with plugged_in(model, prefix):
            model(**given, use_cache=False).loss.backward()
        gradients.append([one.grad.clone() for one in prefix.rows])
        prefix.zero_grad()
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)
        assert bool((plain.abs().flatten(0, -2).sum(dim=-1) > 0).all())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_finite_differences():
    model = model_of("llama").double()
    prefix, _ = prefix_of(model, "prompts", (1,))
    ids = ids_of(1, 6)

    def loss(rows):
        with plugged_in(model, Prefix(prefix.settings, [rows])) as _:
            return model(**behind_prefix({"input_ids": ids, "labels": ids}, LENGTH), use_cache=False).loss

    with plugged_in(model, prefix):
        model(**behind_prefix({"input_ids": ids, "labels": ids}, LENGTH), use_cache=False).loss.backward()
    step, direction = 1e-3, torch.randn_like(prefix.rows[0])
    with torch.no_grad():
        rows = prefix.rows[0].detach()
        slope = (loss(rows + step * direction) - loss(rows - step * direction)) / (2 * step)
    assert float((prefix.rows[0].grad * direction).sum()) == pytest.approx(float(slope), rel=1e-2)


def test_a_folder_gives_back_the_rows_and_refuses_what_does_not_fit(tmp_path):
    model = model_of("llama")
    prefix, _ = prefix_of(model, "key_values", (0, 2))
    prefix.save(tmp_path / "p", "this")
    again = Prefix.load(tmp_path / "p", "this")
    assert again.settings == prefix.settings
    assert all(torch.equal(one, two) for one, two in zip(again.rows, prefix.rows))
    with pytest.raises(InputError, match=r"is of another model"):
        Prefix.load(tmp_path / "p", "that")
    with pytest.raises(InputError, match=r"is no prefix: it has no prefix.json"):
        Prefix.load(tmp_path / "nothing", "this")
    data = bytearray((tmp_path / "p/prefix.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "p/prefix.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"is damaged: the rows are not those of the manifest"):
        Prefix.load(tmp_path / "p", "this")
    manifest = json.loads((tmp_path / "p/prefix.json").read_text())
    (tmp_path / "p/prefix.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(InputError, match=r"is of version 9; this fulgurite reads 1"):
        Prefix.load(tmp_path / "p", "this")
    (tmp_path / "p/prefix.json").write_text("{")
    with pytest.raises(InputError, match=r"is damaged"):
        Prefix.load(tmp_path / "p", "this")


@pytest.mark.parametrize(
    ("how", "layers", "rows"),
    [
        ("kept", (1, 4, 5), [0.0, 10.0, 20.0]),
        ("copy", (1, 2, 3, 4, 5, 6), [0.0, 0.0, 0.0, 10.0, 20.0, 20.0]),
        ("interpolate", (1, 2, 3, 4, 5, 6), [0.0, 10 / 3, 20 / 3, 10.0, 20.0, 20.0]),
    ],
)
def test_rows_find_their_layers_in_the_full_model(how, layers, rows):
    emulated = Prefix(PrefixSettings("prompts", 2, (0, 1, 2)), [torch.full((2, 3), value) for value in (0.0, 10.0, 20.0)])
    found = carried_over(emulated, StandsFor("whole", 7, (1, 4, 5)), how)
    assert found.settings.layers == layers
    assert [float(one.mean()) for one in found.rows] == pytest.approx(rows)


def test_a_prefix_in_all_layers_that_the_emulator_kept_is_the_same_in_the_full_model():
    model = model_of("llama")
    layers = len(model.model.layers)
    prefix, _ = prefix_of(model)
    same = carried_over(prefix, StandsFor("whole", layers, tuple(range(layers))))
    ids = ids_of(2, 7)
    assert torch.equal(logits(model, same, ids), logits(model, prefix, ids))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda model: PrefixSettings("lora"), "prefix.kind='lora' is unknown"),
        (lambda model: PrefixSettings(length=0), "prefix.length=0 leaves nothing"),
        (lambda model: PrefixSettings(layers=(2, 1)), r"prefix.layers=\[2, 1\]: legal are rising"),
        (lambda model: prefix_of(model, layers=(0, 99)), r"prefix.layers=\[0, 99\]: the model has"),
        (lambda model: Prefix.of_text(model, PrefixSettings(length=9), torch.arange(3)), "cannot start at a text of 3 tokens"),
        (lambda model: Prefix(PrefixSettings(length=3), [torch.zeros(3, 4)]), "names other layers than the 1"),
        (lambda model: Prefix(PrefixSettings(length=3, layers=(0,)), [torch.zeros(2, 4)]), "are no prompts of length 3"),
        (lambda model: logits(model, Prefix(PrefixSettings(length=5, layers=(0,)), [torch.zeros(5, 7)]), ids_of(1, 4)), "of 7"),
        (lambda model: carried_over(prefix_of(model)[0], StandsFor("", 9, (0, 1))), "but the emulator has 2 layers"),
        (
            lambda model: carried_over(prefix_of(model)[0], StandsFor("", 9, (3, 2, 5, 6))),
            r"stands_for: \[3, 2, 5, 6\] are no rising",
        ),
        (lambda model: carried_over(prefix_of(model)[0], StandsFor("", 9, (0, 1, 2, 3)), "mean"), "layer_map='mean' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(made, message):
    model = model_of("llama")
    with pytest.raises(InputError, match=message):
        made(model)


def test_a_random_prefix_is_the_same_where_new_tensors_stand_elsewhere():
    """As on a GPU, where Lightning has models made."""
    model, settings = model_of("llama"), PrefixSettings(length=2)
    expected = Prefix.random(model, settings, seed=3)
    with torch.device("meta"):
        found = Prefix.random(model, settings, seed=3)
    assert torch.equal(found.rows[0], expected.rows[0])
