import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fulgurite.callbacks import ExportPretrained
from fulgurite.datamodules import TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import LanguageModel, SoftLabelTeacher
from fulgurite.modules.student import StudentSpec


def fit(folder, text_file, *callbacks, **settings):
    model = LanguageModel("random:tiny", student=StudentSpec([0, 3]), optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    run = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"max_steps": 3, **settings},
    )
    run.fit(model, TextDataModule(str(text_file), block_size=64))
    return model


def test_export_loads_in_transformers_and_computes_the_same(tmp_path, text_file):
    export = ExportPretrained(str(tmp_path / "export"), dtype="float32")
    model = fit(tmp_path, text_file, export, val_check_interval=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.arange(3, 40)[None]
    model.model.eval()
    assert torch.equal(loaded(ids).logits, model.model(ids).logits)
    assert loaded.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("sand").input_ids == model.tokenizer("sand").input_ids
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == 2
    card = (tmp_path / "export" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in ("random:tiny", "LanguageModel", "- train: `", "val_loss", "AutoModelForCausalLM"):
        assert part in card


def test_export_type(tmp_path, text_file):
    fit(tmp_path, text_file, ExportPretrained(str(tmp_path / "export")))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_best_checkpoint_is_exported_beside_the_last(tmp_path, text_file):
    keeper = ModelCheckpoint(monitor="val_loss", mode="max", dirpath=tmp_path / "kept", every_n_train_steps=None)
    # The "best" is the first epoch here: the loss falls, and the largest is kept.
    fit(tmp_path, text_file, keeper, ExportPretrained(str(tmp_path / "export")), max_steps=-1, max_epochs=2)
    best = torch.load(keeper.best_model_path, weights_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export-best")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], best["state_dict"][f"model.{name}"].bfloat16())
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not torch.equal(loaded.state_dict()[name], last.state_dict()[name])


def test_earlier_export_stays_until_the_new_one_is_whole(tmp_path, text_file, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("of an earlier run")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fulgurite.callbacks.export_pretrained.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, text_file, ExportPretrained(str(folder)))
    assert (folder / "config.json").read_text() == "of an earlier run"
    assert not list(tmp_path.glob(".export*"))


def test_bad_settings_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="dtype='int8'"):
        ExportPretrained(dtype="int8")
    with pytest.raises(InputError, match="SoftLabelTeacher"):
        ExportPretrained().setup(None, SoftLabelTeacher("random:tiny"), "fit")


def test_a_folder_that_is_no_export_is_left_as_it_is(tmp_path, text_file):
    (tmp_path / "models/other").mkdir(parents=True)
    with pytest.raises(InputError, match="holds something else"):
        fit(tmp_path, text_file, ExportPretrained(str(tmp_path / "models")))
    assert (tmp_path / "models/other").is_dir()
    with pytest.raises(InputError, match="no name of its own"):
        fit(tmp_path, text_file, ExportPretrained("."))
    with pytest.raises(InputError, match="is a file"):
        fit(tmp_path, text_file, ExportPretrained(str(text_file)))
