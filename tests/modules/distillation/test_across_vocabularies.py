"""A student with another tokenizer learns from a teacher's store."""

import pytest
import torch
from lightning.pytorch import seed_everything

from fulgurite.datamodules import SoftLabelDataModule
from fulgurite.datamodules.soft_labels import StoreError
from fulgurite.errors import InputError
from fulgurite.modules.distillation import LabelSettings
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer
from tests.modules.distillation.test_module import capture, losses_of, student, text, trainer
from tests.vocabularies import TOKENIZERS


@pytest.fixture
def store(tmp_path, text_file):
    """Labels of a teacher whose tokens are longer than the student's bytes."""
    tokenizer, model = TOKENIZERS["large"], tiny_model(seed=7)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return capture(tmp_path, str(tmp_path / "teacher"), text(text_file, train_tokens=64 * 8), LabelSettings(k=12))


def labels_of(store, **settings):
    return SoftLabelDataModule(store, val_fraction=0, batch_size=2, **{"alignment": "vocabulary", **settings})


def test_another_tokenizer_is_refused_without_alignment(tmp_path, store):
    with pytest.raises(StoreError, match="data.alignment=vocabulary"):
        losses_of(tmp_path, student(), labels_of(store, alignment=None))


@pytest.mark.parametrize(
    ("settings", "alignment"),
    [
        ({"soft_weight": 0.0}, "vocabulary"),
        ({}, "vocabulary"),
        ({"chunk_weight": 0.5}, "vocabulary"),
        ({"third_vocabulary": True, "remainder": "renormalize"}, "vocabulary"),
        ({"divergence": "uld"}, "positions"),
        ({"remainder": "text_tail", "soft_weight": 1.0}, "vocabulary"),
    ],
)
def test_every_form_trains_the_same_twice(tmp_path, store, settings, alignment):
    losses = losses_of(tmp_path, student(**settings), labels_of(store, alignment=alignment))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert losses_of(tmp_path, student(**settings), labels_of(store, alignment=alignment)) == losses


@pytest.mark.parametrize(
    ("settings", "alignment", "message"),
    [
        ({}, "positions", "divergence='forward_kl' compares tokens"),
        ({"chunk_weight": -1.0}, "vocabulary", "chunk_weight=-1.0"),
        ({"chunk_temperature": 0.1}, "vocabulary", "chunk_temperature=0.1"),
        ({}, "bytes", "alignment='bytes' is unknown"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, store, settings, alignment, message):
    with pytest.raises(InputError, match=message):
        losses_of(tmp_path, student(**settings), labels_of(store, alignment=alignment))


def test_likelihoods_of_tempered_labels_are_refused(tmp_path, text_file):
    tokenizer, model = TOKENIZERS["large"], tiny_model(seed=7)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    settings = LabelSettings(k=12, temperature=2.0)
    tempered = capture(tmp_path, str(tmp_path / "teacher"), text(text_file, train_tokens=64 * 8), settings)
    with pytest.raises(InputError, match="chunk_weight=0.5 with labels of temperature 2.0"):
        losses_of(tmp_path, student(chunk_weight=0.5), labels_of(tempered))


def test_figures_count_the_tokens_that_have_labels(tmp_path, store):
    data = SoftLabelDataModule(store, val_store=store, batch_size=2, alignment="vocabulary")
    model = student()
    run = trainer(tmp_path)
    run.validate(model, datamodule=data, verbose=False)
    soft = agreeing = labelled = 0
    for index in range(len(data.val_set)):
        batch = data._collate([data.val_set[index]])
        parts = model.eval().loss_parts(batch)
        soft, agreeing = soft + float(parts.soft) * parts.tokens, agreeing + float(parts.agreement) * parts.tokens
        labelled += int((batch["soft_labels"].counts > 0).sum())
    assert float(run.callback_metrics["val_kl"]) == pytest.approx(soft / labelled, rel=1e-4)
    assert float(run.callback_metrics["val_agreement"]) == pytest.approx(agreeing / labelled, rel=1e-4)


def test_validation_says_the_same_of_a_student_whatever_becomes_of_the_tail(tmp_path, store):
    """What the text teaches within the tail is learnt, but no divergence from the teacher."""
    found = []
    for remainder in ("tail_bucket", "text_tail"):
        run = trainer(tmp_path)
        data = SoftLabelDataModule(store, val_store=store, batch_size=2, alignment="vocabulary")
        run.validate(student(remainder=remainder), datamodule=data, verbose=False)
        found.append(float(run.callback_metrics["val_kl"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_no_agreement_is_logged_of_ids_that_are_not_the_students(tmp_path, store):
    run = trainer(tmp_path)
    data = SoftLabelDataModule(store, val_store=store, batch_size=2, alignment="positions")
    run.validate(student(divergence="uld"), datamodule=data, verbose=False)
    assert "val_kl" in run.callback_metrics
    assert "val_agreement" not in run.callback_metrics


def test_forms_for_another_tokenizer_are_refused_with_ones_own(tmp_path, text_file):
    own = tmp_path / "own"
    tiny_model(seed=3).save_pretrained(own)
    tiny_tokenizer().save_pretrained(own)
    same = capture(tmp_path, str(own), text(text_file, train_tokens=64 * 8), LabelSettings(k=12))
    for settings in ({"chunk_weight": 0.5}, {"third_vocabulary": True}):
        with pytest.raises(InputError, match="is for a store (of another tokenizer|with data.alignment)"):
            losses_of(tmp_path, student(**settings), labels_of(same, alignment=None))


def one_batch(store, model):
    """The first batch of a store for a model that is not in a Trainer."""
    data = labels_of(store, tokenizer="random:tiny")
    data.setup()
    model.configure_model()
    return data, data._collate([data.train_set[0], data.train_set[1]])


def test_the_plain_form_equals_a_literal_loop(store):
    seed_everything(0)
    model = student(third_vocabulary=True, remainder="renormalize", soft_weight=0.3)
    data, batch = one_batch(store, model)
    model._label_vocabulary = torch.from_numpy(data.label_vocabulary())
    third = model._label_vocabulary.tolist()
    model.train()
    parts = model.loss_parts(batch)
    logits = model.model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    hard = soft = 0.0
    row = 0
    labels = batch["soft_labels"]
    for sequence in range(len(batch["labels"])):
        for position in range(batch["labels"].shape[1] - 1):
            realised = int(batch["labels"][sequence, position + 1])
            if realised == -100:
                continue
            target = torch.zeros(len(third))
            for number, p in zip(labels.ids[row].tolist(), labels.probabilities[row].tolist()):
                if number >= 0:
                    target[third.index(number)] += p
            log_q = logits[sequence, position, third].log_softmax(0)
            hard -= float(log_q[third.index(realised)])
            if target.sum() > 0:
                target /= target.sum()
                soft += float((torch.xlogy(target, target) - target * log_q).sum())
            row += 1
    assert row == parts.tokens
    assert float(parts.hard) == pytest.approx(hard / row, rel=1e-5)
    assert float(parts.soft) == pytest.approx(soft / row, rel=1e-4)
    model.eval()
    assert float(model.loss_parts(batch).hard) > float(parts.hard)  # the whole vocabulary again


def test_chunks_add_their_loss_and_gradient(store):
    seed_everything(0)
    plain, chunked = student(), student(chunk_weight=0.5)
    _, batch = one_batch(store, plain)
    one_batch(store, chunked)
    chunked.load_state_dict(plain.state_dict())
    parts = [model.train().loss_parts(batch) for model in (plain, chunked)]
    assert float(parts[1].loss) > float(parts[0].loss)
    gradients = []
    for model, part in zip((plain, chunked), parts):
        part.loss.backward()
        gradients.append(model.model.get_input_embeddings().weight.grad)
    assert not torch.allclose(*gradients)
