"""The prefix that rounds of averaging begin with."""

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.experiments.offsite.federation.trial import prefix_to_begin_with
from fulgurite.modules.offsite import Prefix, PrefixSettings
from fulgurite.modules.offsite.prefix import StandsFor
from fulgurite.modules.tiny import tiny_model

WHOLE = StandsFor("w" * 32, 6, (0, 1, 3, 5))


@pytest.fixture
def start(tmp_path):
    Prefix.random(tiny_model(), PrefixSettings(length=2)).save(tmp_path / "start", "e" * 32, WHOLE)
    return tmp_path / "start"


def configs(folder, *texts):
    files = [folder / f"{number}.yaml" for number in range(len(texts))]
    for file, text in zip(files, texts):
        file.write_text(text)
    return files


def test_an_emulators_prefix_is_carried_over_for_the_split_alone(start, tmp_path):
    tune, split = "model: {init_args: {phase: emulator}}", "model: {init_args: {phase: split}}"
    assert prefix_to_begin_with(start, configs(tmp_path, tune, ""), tmp_path / "own") == start
    assert prefix_to_begin_with(start, configs(tmp_path, split, split), tmp_path / "own") == tmp_path / "own"
    own, tuned = Prefix.load(tmp_path / "own", WHOLE.model), Prefix.read(start)[0]
    assert own.settings.layers == WHOLE.layer_map
    assert all(torch.equal(*pair) for pair in zip(own.rows, tuned.rows, strict=True))
    with pytest.raises(InputError, match=r"their phases are \['emulator', 'split'\]"):
        prefix_to_begin_with(start, configs(tmp_path, tune, split), tmp_path / "own")
