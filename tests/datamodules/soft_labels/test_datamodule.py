import itertools

import pytest
import torch

from fulgurite.datamodules import SoftLabelDataModule
from fulgurite.datamodules.soft_labels import SoftLabelAppender, StoreError, StoreHeader
from fulgurite.datamodules.soft_labels.store import sequence_layout
from fulgurite.modules.distillation import LabelSettings, SoftLabels
from fulgurite.modules.tiny import tiny_tokenizer
from fulgurite.modules.tokens import tokenizer_fingerprint

from .test_store import sequence


@pytest.fixture
def store(tmp_path):
    header = StoreHeader(
        teacher="a teacher",
        teacher_fingerprint="t" * 32,
        tokenizer_fingerprint=tokenizer_fingerprint(tiny_tokenizer()),
        vocabulary=259,
        settings=LabelSettings(k=3),
        weights="float32",
    )
    appender = SoftLabelAppender(tmp_path / "store", header)
    for seed in range(20):
        appender.append([sequence(seed)])
    appender.close()
    return str(tmp_path / "store")


def ready(store, **settings):
    data = SoftLabelDataModule(store, **{"tokenizer": "random:tiny", **settings})
    data.prepare_data()
    data.setup()
    return data


def test_batches_hold_labels_for_every_supervised_token(store):
    data = ready(store, batch_size=4)
    assert (len(data.train_set), len(data.val_set)) == (19, 1)
    for batch in itertools.islice(data.train_dataloader(), 2):
        labels = batch["soft_labels"]
        assert isinstance(labels, SoftLabels)
        assert len(labels) == int((batch["labels"][:, 1:] != -100).sum())
        for row in range(4):
            starts, supervised = sequence_layout(batch["position_ids"][row], batch["labels"][row])
            assert starts.tolist() == [0, 5]
            assert supervised.sum() == 11


def test_training_tokens_can_be_limited(store):
    assert len(ready(store, train_tokens=60, val_fraction=0).train_set) == 5
    with pytest.raises(StoreError, match="train_tokens=5"):
        ready(store, train_tokens=5)


def test_store_of_another_tokenizer_is_refused(store, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["sand"])
    data = SoftLabelDataModule(store)
    data._tokenizer = tokenizer
    with pytest.raises(StoreError, match=r"another tokenizer: that of a teacher"):
        data.setup()


def test_store_of_another_teacher_is_refused(store):
    with pytest.raises(StoreError, match="another teacher: a teacher"):
        ready(store, teacher_fingerprint="u" * 32)
    assert len(ready(store, teacher_fingerprint="t" * 32).train_set) == 19


def test_missing_store_prints_the_capture_command(tmp_path):
    with pytest.raises(StoreError, match="fulgurite predict -c distillation/capture .*--trainer.callbacks.store none"):
        SoftLabelDataModule("none")


def test_own_validation_store(store):
    data = ready(store, val_store=store)
    assert len(data.train_set) == len(data.val_set) == 20


def test_workers_read_the_same(store):
    one, two = (list(ready(store, num_workers=n, batch_size=4).train_dataloader()) for n in (0, 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two))
    assert all(torch.equal(a["soft_labels"].ids, b["soft_labels"].ids) for a, b in zip(one, two))
