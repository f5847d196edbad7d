from types import SimpleNamespace

import pytest
import torch

from fulgurite.datamodules import TextDataModule, token_cache
from fulgurite.errors import InputError
from fulgurite.modules.pretrained import load_tokenizer


def ready(*args, **settings):
    data = TextDataModule(*args, **{"tokenizer": "random:tiny", "block_size": 32, "batch_size": 4, **settings})
    data.prepare_data()
    data.setup()
    return data


def ids(dataset):
    return torch.stack([dataset[index]["input_ids"] for index in range(len(dataset))])


def test_split_is_deterministic_and_disjoint(documents_file):
    first, second = ready(str(documents_file), val_fraction=0.3), ready(str(documents_file), val_fraction=0.3)
    assert torch.equal(ids(first.train_set), ids(second.train_set))
    assert torch.equal(ids(first.val_set), ids(second.val_set))
    total = len(first.train_set) + len(first.val_set)
    assert len(first.val_set) / total == pytest.approx(0.3, abs=0.05)


def test_text_is_tokenised_once(documents_file, monkeypatch):
    ready(str(documents_file))
    monkeypatch.setattr(token_cache, "atomic_folder", None)  # a second tokenisation would fail
    assert len(ready(str(documents_file)).train_set) > 0


def test_data_of_one_tokenizer_is_not_given_to_a_model_with_another(text_file):
    def trainer(tokenizer):
        return SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer), global_rank=0, world_size=1)

    data = TextDataModule(str(text_file), block_size=32)
    data.trainer = trainer(load_tokenizer("random:tiny"))
    data.setup()
    data.trainer = trainer(load_tokenizer("random:tiny"))  # of another model, but the same
    data.train_dataloader()
    other = load_tokenizer("random:tiny")
    other.add_tokens(["sand"])
    data.trainer = trainer(other)
    data.setup()
    with pytest.raises(InputError, match="make it anew"):
        data.train_dataloader()


def test_limits_count_tokens(documents_file):
    data = ready(str(documents_file), train_tokens=100, val_tokens=64, val_fraction=0.3)
    assert (len(data.train_set), len(data.val_set)) == (3, 2)


def test_own_validation_text(documents_file, text_file):
    data = ready(str(documents_file), val=str(text_file), predict_split="val")
    assert data.predict_set is data.val_set
    assert set(data.hashes()) == {"tokenizer", "train", "val"}


def test_eos_ends_every_document(documents_file):
    with_end, without = (ready(str(documents_file), append_eos=append) for append in (True, False))
    assert int((ids(with_end.train_set) == 2).sum()) > 20
    assert int((ids(without.train_set) == 2).sum()) == 0


def test_bos_begins_every_piece(documents_file):
    data = ready(str(documents_file), bos="always")
    for index in range(len(data.train_set)):
        block = data.train_set[index]
        assert bool((block["input_ids"][block["position_ids"] == 0] == 1).all())


def test_calibration_batch_is_the_first_blocks(documents_file):
    data = ready(str(documents_file))
    batch = data.calibration_batch(50)
    assert torch.equal(batch["input_ids"], ids(data.train_set)[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"train_tokens": 10}, "train_tokens=10.*block_size=32"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val": "missing.txt"}, "val='missing.txt'"),
        ({"tokenizer": "random:tyni"}, "random:tiny"),
        ({"block_size": 100_000}, r"tokens, shorter than one block of block_size=100000"),
        ({"val_fraction": 0.001}, "raise val_fraction"),
    ],
)
def test_bad_settings_are_refused_by_name(documents_file, settings, message):
    with pytest.raises(InputError, match=message):
        ready(str(documents_file), **settings)


@pytest.mark.parametrize("content", ["", "  \n \n"])
def test_empty_text_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"train=.*empty\.txt.*holds no text"):
        ready(str(path))


def test_without_tokenizer_and_model_the_message_says_so(documents_file):
    data = TextDataModule(str(documents_file))
    with pytest.raises(InputError, match="tokenizer=None"):
        data.prepare_data()


def test_calibration_batch_is_the_same_where_new_tensors_stand_elsewhere(documents_file):
    """As on a GPU, where Lightning has models made, for which it is asked."""
    data = ready(str(documents_file))
    expected = data.calibration_batch(50)
    with torch.device("meta"):
        found = data.calibration_batch(50)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
