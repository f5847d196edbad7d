"""What is measured of trainings and commands."""

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.language_model.measure import estimated, start_up


def test_a_training_is_said_and_measured(tmp_path, monkeypatch, long_documents):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.source": "random:tiny",
        "data.train": long_documents,
        "data.block_size": 64,
        "trainer.precision": "32-true",
    }
    found = estimated(config="language_model/finetune", steps=3, seed=0, settings=settings)
    assert found["memory_said"] > 10**6
    assert found["memory"] > 0
    assert found["seconds"] > 0
    assert found["seconds_ratio"] == found["seconds_said"] / found["seconds"]


def test_start_up_is_timed_and_a_failure_is_told():
    found = start_up(words="--version", rounds=1, seed=0)
    assert found["seconds"] > 0
    assert 0 < found["imported"] < 400  # neither PyTorch nor Lightning
    with pytest.raises(InputError, match="fulgurite fitt failed: .*'fitt' is no command"):
        start_up(words="fitt", rounds=1, seed=0)
