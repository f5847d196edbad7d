"""Emulators: which layers are kept, what stays as it is, and how one is fetched."""

import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from fulgurite.callbacks import ExportPretrained
from fulgurite.datamodules import TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import EmulatorDistillation, FusionCompression
from fulgurite.modules.fusion import BestSelection, FusionShape, KeepLayers, LearnedFusion
from fulgurite.modules.offsite import EmulatorManifest, EmulatorSpec
from fulgurite.modules.offsite import emulator as module
from fulgurite.modules.offsite.emulator import EmulatorFiles, download, fused_layers
from fulgurite.modules.pretrained import load_model, load_tokenizer
from fulgurite.modules.student import decoder_layers
from fulgurite.modules.tiny import tiny_model

from ..span_attention.small import model_of


def trainer(folder, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **settings})


def text(folder):
    path = folder / "text.txt"
    path.write_text("sand and glass, rain and wind. " * 60)
    return TextDataModule(str(path), block_size=64, batch_size=2)


@pytest.mark.parametrize(
    ("spec", "layers", "kept"),
    [
        (EmulatorSpec([0, 1, 5], identical=2), 8, [0, 1, 5]),
        (EmulatorSpec(4, identical=2, by="even"), 8, [0, 1, 4, 7]),
        (EmulatorSpec(6, identical=1, by="even"), 7, [0, 1, 2, 4, 5, 6]),
        (EmulatorSpec(2, identical=1, by="even"), 30, [0, 29]),
    ],
)
def test_layers_that_are_kept(spec, layers, kept, monkeypatch):
    monkeypatch.setattr(module, "decoder_layers", lambda model: [None] * layers)
    assert spec.choose(None, None) == kept


def test_layers_that_change_their_input_most_are_kept_behind_the_identical_ones():
    model = model_of("llama")
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):  # the second layer does nothing
            next(part for key, part in decoder_layers(model)[1].named_modules() if key.endswith(name)).weight.zero_()
    spec = EmulatorSpec(2, identical=1)
    assert spec.needs_calibration
    assert spec.choose(model, {"input_ids": torch.randint(2, 60, (1, 20))}) == [0, 2]
    with pytest.raises(InputError, match="by='block_influence' needs tokens"):
        spec.choose(model, None)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (EmulatorSpec(1), "legal are 2 to 3 layers of the model's 4"),
        (EmulatorSpec(4), "legal are 2 to 3"),
        (EmulatorSpec(3, identical=3), "emulator.identical=3: legal are 1 to 2"),
        (EmulatorSpec([0, 2, 3], identical=2), "leaves out one of the first 2"),
        (EmulatorSpec([0, 3, 2], identical=1), "rising indices from 0 to 3"),
        (EmulatorSpec(3, identical=1, by="size"), "emulator.by='size' is unknown"),
    ],
)
def test_emulators_that_cannot_be_are_refused(spec, match):
    with pytest.raises(InputError, match=match):
        EmulatorDistillation("random:tiny", emulator=spec)


def test_distillation_leaves_what_a_party_holds_and_comes_nearer_to_the_model(tmp_path):
    seed_everything(0)
    system, untrained = (
        EmulatorDistillation(
            "random:tiny", emulator=EmulatorSpec(3, identical=2), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
        )
        for _ in range(2)
    )
    run = trainer(
        tmp_path, max_steps=12, val_check_interval=6, callbacks=[ExportPretrained(str(tmp_path / "emulator"), dtype=None)]
    )
    first = trainer(tmp_path).validate(untrained, text(tmp_path), verbose=False)[0]["val_kl"]
    run.fit(system, text(tmp_path))
    assert run.callback_metrics["val_kl"] < 0.9 * first
    assert run.callback_metrics["train_hidden"] > 0
    small, whole = load_model(str(tmp_path / "emulator")), tiny_model()
    assert torch.equal(small.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert torch.equal(small.model.norm.weight, whole.model.norm.weight)
    for place, layer in enumerate(decoder_layers(small)):
        other = decoder_layers(whole)[EmulatorManifest.load(tmp_path / "emulator").stands_for[place]].state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in layer.state_dict().items()) == (place < 2)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = EmulatorDistillation.load_from_checkpoint(
        tmp_path / "one.ckpt", emulator=EmulatorSpec(3, identical=2), weights_only=True
    )
    assert again.stands_for == system.stands_for
    assert again._whole == system._whole


@pytest.mark.parametrize("start", [LearnedFusion, BestSelection, KeepLayers])
def test_fused_layers_make_an_emulator(tmp_path, start):
    seed_everything(0)
    shape = FusionShape(num_hidden_layers=3, kept_layers=1)
    fusion = FusionCompression("random:tiny", shape=shape, start=start(calibration_tokens=128))
    trainer(tmp_path, max_steps=2, callbacks=[ExportPretrained(str(tmp_path / "fused"), dtype=None)]).fit(fusion, text(tmp_path))
    spec = EmulatorSpec(identical=1, fused=str(tmp_path / "fused"))
    system = EmulatorDistillation("random:tiny", emulator=spec)
    trainer(tmp_path, max_steps=0, callbacks=[ExportPretrained(str(tmp_path / "emulator"), dtype=None)]).fit(
        system, text(tmp_path)
    )
    found = EmulatorManifest.load(tmp_path / "emulator")
    assert found.stands_for == tuple(fused_layers(str(tmp_path / "fused")))
    assert (found.stands_for[0], len(found.stands_for), found.layers) == (0, 3, 4)
    wrong = EmulatorDistillation("random:tiny", emulator=EmulatorSpec(identical=2, fused=str(tmp_path / "fused")))
    with pytest.raises(InputError, match="first 2 layers are not those of source"):
        trainer(tmp_path, max_steps=0).fit(wrong, text(tmp_path))
    with pytest.raises(InputError, match="has no fusion.json"):
        EmulatorDistillation("random:tiny", emulator=EmulatorSpec(fused=str(tmp_path)))


class Files:
    """An owner's files, with calls that fail after some pieces."""

    def __init__(self, folder, pieces=10**9):
        self.files, self.pieces, self.told = EmulatorFiles(folder), pieces, None

    def manifest(self):
        return self.told or self.files.files

    def read(self, file, offset):
        if self.pieces == 0:
            raise InputError("gone")
        self.pieces -= 1
        return self.files.piece(file, offset).numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "offered"
    tiny_model().save_pretrained(place)
    load_tokenizer("random:tiny").save_pretrained(place)
    files = {file.name: module.digest_of(file) for file in place.iterdir()}
    EmulatorManifest("f" * 32, 9, (0, 1, 2, 3), 1, "tiny", None, files).save(place)
    return place


def test_a_download_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
    whole = sum(file["bytes"] for file in EmulatorFiles(folder).files.values())
    calls, done = 0, []
    for _ in range(100):
        client = Files(folder, pieces=5)
        try:
            download(client, tmp_path / "got", progress=lambda now, end: done.append((now, end)))
            break
        except InputError:
            assert client.pieces == 0
            assert not (tmp_path / "got").exists()
        calls += 5
    assert calls <= whole / 10_000 + 10
    assert done[-1] == (whole, whole)
    assert sorted(file.name for file in (tmp_path / "got").iterdir()) == sorted(EmulatorFiles(folder).files)
    assert all((tmp_path / "got" / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())
    assert not (tmp_path / ".got.part").exists()
    with pytest.raises(InputError, match="is there already"):
        download(Files(folder), tmp_path / "got")


def test_files_that_are_not_as_they_were_promised_are_refused(folder, tmp_path):
    client = Files(folder)
    client.told = {name: dict(told) for name, told in client.files.files.items()}
    client.told["config.json"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="config.json did not arrive as the owner says"):
        download(client, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    client.told = {"../config.json": {"bytes": 1, "sha256": "0"}}
    with pytest.raises(InputError, match="names with folders are not taken"):
        download(client, tmp_path / "got")
    for file, offset in (("../x", 0), ("config.json", -1), ("config.json", 10**9)):
        with pytest.raises(InputError, match="is no place in the emulator"):
            client.files.piece(file, offset)


def test_what_is_no_emulator_is_refused(folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="is no emulator: it has no config.json"):
        EmulatorFiles(folder)
    with pytest.raises(InputError, match="it has no emulator.json"):
        EmulatorManifest.load(tmp_path)
    told = json.loads((folder / "emulator.json").read_text())
    (folder / "emulator.json").write_text(json.dumps({**told, "version": 9}))
    with pytest.raises(InputError, match="is of another version"):
        EmulatorManifest.load(folder)
    (folder / "emulator.json").write_text("[]")
    with pytest.raises(InputError, match="is damaged"):
        EmulatorManifest.load(folder)
