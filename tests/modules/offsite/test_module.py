"""The party's system: emulator, plug-in and split in a Trainer."""

import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.callbacks import ExportPrefix, ExportPretrained, GradientPruning
from fulgurite.datamodules import InstructionDataModule, TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import EmulatorDistillation, OffsitePrefixTuning
from fulgurite.modules.language_model import GenerationSettings
from fulgurite.modules.offsite import EmulatorManifest, EmulatorSpec, ModelPart, Prefix, PrefixSettings
from fulgurite.modules.offsite.owner import OwnerLayers
from fulgurite.modules.offsite.remote import LocalOwner
from fulgurite.modules.pretrained import load_model, model_fingerprint
from fulgurite.modules.student import decoder_layers
from fulgurite.modules.tiny import tiny_model

LAYERS, CUT, SETTINGS = 4, 1, PrefixSettings(length=3)


def trainer(folder, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **settings})


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = [("sand and glass", "yes"), ("rain and wind", "no")] * 12
    path.write_text(
        "".join(json.dumps({"prompt": f"{text} {n % 7}", "response": answer}) + "\n" for n, (text, answer) in enumerate(words))
    )
    return str(path)


def data(rows_file, **settings):
    return InstructionDataModule(rows_file, **{"val_fraction": 0.25, "batch_size": 3, "max_length": 128, "seed": 0, **settings})


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """Layers 0, 1 and 3 of random:tiny, not trained."""
    folder = tmp_path_factory.mktemp("emulator")
    text = folder / "text.txt"
    text.write_text("sand and glass " * 100)
    module = EmulatorDistillation("random:tiny", emulator=EmulatorSpec([0, 1, 3], identical=2))
    run = trainer(folder, max_steps=0, callbacks=[ExportPretrained(str(folder / "emulator"), dtype=None)])
    run.fit(module, TextDataModule(str(text), block_size=64))
    return folder / "emulator"


def owner(**settings):
    return LocalOwner(OwnerLayers(ModelPart(tiny_model(), CUT, LAYERS), **settings))


def tuning(source, **settings):
    usual = {"prefix": SETTINGS, "weights": "float32", "optimizer": lambda rows: torch.optim.AdamW(rows, lr=1e-2)}
    module = OffsitePrefixTuning(str(source), **{**usual, **settings})
    if settings.get("phase") == "split":
        module.owner, module.cut = owner(), CUT
    return module


@pytest.fixture(scope="module")
def start(emulator, tmp_path_factory, rows_file):
    folder = tmp_path_factory.mktemp("start")
    seed_everything(0)
    module = tuning(emulator)
    trainer(folder, max_steps=2, callbacks=[ExportPrefix(str(folder / "prefix"))]).fit(module, data(rows_file))
    return folder / "prefix"


def test_an_emulator_says_what_it_stands_for(emulator):
    manifest = EmulatorManifest.load(emulator)
    whole = tiny_model()
    assert (manifest.stands_for, manifest.identical, manifest.layers) == ((0, 1, 3), 2, LAYERS)
    assert manifest.model == model_fingerprint(whole)
    small = load_model(str(emulator))
    for ours, place in zip(decoder_layers(small), manifest.stands_for):
        for name, tensor in decoder_layers(whole)[place].state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor)
    (emulator.parent / "spoilt").mkdir()
    for file in emulator.iterdir():
        (emulator.parent / "spoilt" / file.name).write_bytes(file.read_bytes())
    (emulator.parent / "spoilt" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is not the emulator's: its hash is another"):
        EmulatorManifest.load(emulator.parent / "spoilt")


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_fit_through_a_split_is_that_of_the_whole_model_to_the_bit(emulator, start, rows_file, tmp_path, clip):
    """With accumulation and clipping, as the Trainer does them."""
    found = []
    for source, phase in (("random:tiny", "emulator"), (emulator, "split")):
        seed_everything(0)
        module = tuning(source, phase=phase, start=str(start), layer_map="copy")
        run = trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=clip, val_check_interval=2)
        run.fit(module, data(rows_file))
        found.append(({name: float(value) for name, value in run.callback_metrics.items()}, [*module.prefix.rows]))
    assert found[0][0] == found[1][0]
    assert found[0][0]["val_loss"] > 0
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    begun = Prefix.load(start, EmulatorManifest.load(emulator).model, "copy")
    assert all(not torch.equal(one, other) for one, other in zip(begun.rows, found[0][1]))


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(emulator, start, rows_file, tmp_path):
    found = []
    for stop in (4, 2):
        seed_everything(0)
        module = tuning(emulator, phase="split", start=str(start))
        keep = ModelCheckpoint(tmp_path, filename="stopped", every_n_train_steps=2)
        run = trainer(tmp_path, max_steps=stop, enable_checkpointing=True, callbacks=[keep] if stop < 4 else [])
        run.fit(module, data(rows_file))
        if stop < 4:
            assert (tmp_path / "stopped.ckpt").stat().st_size < 60_000  # no weights of the model
            module = tuning(emulator, phase="split", start=str(start))
            run = trainer(tmp_path, max_steps=4)
            run.fit(module, data(rows_file), ckpt_path=str(tmp_path / "stopped.ckpt"), weights_only=True)
        found.append([*module.prefix.rows])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    other = tuning("random:tiny")
    with pytest.raises(InputError, match="checkpoint's prefix is for another model"):
        trainer(tmp_path, max_steps=4).fit(other, data(rows_file), ckpt_path=str(tmp_path / "stopped.ckpt"), weights_only=True)


def test_an_emulators_prefix_is_plugged_in(emulator, start, rows_file, tmp_path):
    figures = []
    for phase, source in (("plug_in", "random:tiny"), ("split", emulator)):
        module = tuning(source, phase=phase, start=str(start), candidates=["yes", "no"])
        figures.append(trainer(tmp_path).validate(module, data(rows_file), verbose=False)[0])
        texts = trainer(tmp_path).predict(module, data(rows_file), weights_only=True)
        figures[-1]["texts"] = texts
    assert figures[0] == figures[1]
    assert 0 <= figures[0]["val_accuracy"] <= 1
    alone = tuning("random:tiny", phase="plug_in", prefix=None, candidates=["yes", "no"])
    assert trainer(tmp_path).validate(alone, data(rows_file), verbose=False)[0]["val_loss"] != figures[0]["val_loss"]
    with pytest.raises(InputError, match="there is nothing to train here"):
        trainer(tmp_path, max_steps=1).fit(alone, data(rows_file))


@pytest.mark.parametrize("candidates", [None, ["yes", "no"]])
@pytest.mark.parametrize("send_labels", [False, True])
def test_a_head_at_the_owner(emulator, start, rows_file, tmp_path, candidates, send_labels):
    seed_everything(0)
    settings = {"head": "owner", "candidates": candidates, "send_labels": send_labels, "start": str(start)}
    module = tuning(emulator, phase="split", generation=GenerationSettings(max_new_tokens=4), **settings)
    run = trainer(tmp_path, max_steps=3)
    run.fit(module, data(rows_file))
    asked = [sent.head for sent in module._owners.steps._sent]
    assert all((head.labels is not None) == send_labels for head in asked)
    plain = tuning("random:tiny", phase="plug_in", start=str(start))
    plain.generation = GenerationSettings(max_new_tokens=4)
    trainer(tmp_path).validate(plain, data(rows_file), verbose=False)
    with torch.no_grad():
        for own, trained in zip(plain.prefix.rows, module.prefix.rows):
            own.copy_(trained)
    texts = [trainer(tmp_path).predict(one, data(rows_file)) for one in (plain, module)]
    assert texts[0] == texts[1]
    measured = trainer(tmp_path).validate(module, data(rows_file), verbose=False)[0]
    assert ("val_perplexity" in measured) == (candidates is None)
    if candidates is None:
        losses = [trainer(tmp_path).validate(one, data(rows_file), verbose=False)[0]["val_loss"] for one in (plain, module)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("send_labels", [False, True])
def test_a_batch_without_a_token_that_decides_counts_for_nothing(emulator, start, tmp_path, send_labels):
    """As where all rows are cut within what all answers begin with."""
    settings = {"head": "owner", "send_labels": send_labels, "start": str(start), "candidates": ["it is yes", "it is no"]}
    module = tuning(emulator, phase="split", optimizer=lambda rows: torch.optim.SGD(rows, lr=1.0), **settings)
    ids = torch.arange(60, 72)
    row = {"input_ids": ids, "labels": torch.cat([torch.full((8,), -100), ids[8:]])}
    module.configure_model()
    before = [rows.detach().clone() for rows in module.prefix.rows]
    loader = torch.utils.data.DataLoader([row] * 4, batch_size=2)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, loader)
    assert run.callback_metrics["train_loss"] == 0
    assert all(torch.equal(old, rows) for old, rows in zip(before, module.prefix.rows))
    party = tuning("random:tiny", phase="plug_in", start=str(start), candidates=settings["candidates"])
    for each in (module, party):
        trainer(tmp_path).validate(each, loader, verbose=False)
        assert not each.accuracy.update_called


def test_rows_that_stay_at_the_party(emulator, start, rows_file, tmp_path):
    module = tuning(emulator, phase="split", start=str(start), prefix_layers="party")
    module.configure_model()
    before = [rows.detach().clone() for rows in module.prefix.rows]
    trainer(tmp_path, max_steps=2).fit(module, data(rows_file))
    assert module.prefix.settings.layers == (0,)
    assert module._owners.sends_virtual_states
    assert not torch.equal(before[0], module.prefix.rows[0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"head": "owner"}, "head='owner' is for phase: split; the phase is 'emulator'"),
        ({"prefix_layers": "party"}, "prefix_layers='party' is for phase: split"),
        ({"phase": "split"}, "has no emulator.json"),
        ({"phase": "split", "send_labels": True}, "send_labels=true is for head: owner"),
        ({"candidates": ["yes"]}, "leaves nothing to choose"),
        ({"start": "nowhere"}, "start='nowhere' is no prefix"),
        ({"text": "a", "prefix": None}, "text is what a new prefix begins as"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, match):
    with pytest.raises(InputError, match=match):
        OffsitePrefixTuning("random:tiny", **settings)


def test_what_does_not_fit_is_refused_before_training(emulator, start, rows_file, tmp_path):
    module = tuning(emulator, phase="split")
    module.cut = 3
    with pytest.raises(InputError, match="The owner's layers begin at 3, but the emulator has only the first 2"):
        module.configure_model()
    with pytest.raises(InputError, match="two of them begin with the same token"):
        tuning("random:tiny", candidates=["yes", "yet", "no"]).configure_model()
    rows = [{"prompt": f"{n}?", "response": "maybe" if n < 2 else "yes"} for n in range(20)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="2 of 20 rows have another answer, such as 'maybe'. Name all"):
        trainer(tmp_path, max_steps=1).fit(tuning("random:tiny", candidates=["yes", "no"]), data(str(other)))
    loose = data(str(other), batch_size=20, val_fraction=0, tokenizer=str(emulator))
    loose.setup("fit")
    module = tuning(emulator, phase="split", start=str(start), head="owner", candidates=["yes", "no"])
    with pytest.raises(InputError, match="begins as none of candidates="):
        trainer(tmp_path, max_steps=1).fit(module, loose.train_dataloader())
    module = tuning(emulator, phase="split", prefix=PrefixSettings(length=3, layers=(2,)), prefix_layers="party")
    with pytest.raises(
        InputError, match=r"prefix_layers: party trains rows of the layers before the owner's, 0 to 0.* \[3\] alone"
    ):
        module.configure_model()
    with pytest.raises(InputError, match="GradientPruning does not work with phase: split"):
        trainer(tmp_path, max_steps=1, callbacks=[GradientPruning()]).fit(
            tuning(emulator, phase="split", start=str(start)), data(rows_file)
        )
    with pytest.raises(InputError, match="needs the owner's address"):
        OffsitePrefixTuning(str(emulator), phase="split").configure_model()
    with pytest.raises(InputError, match="of another model"):
        Prefix.load(start, "f" * 32)
    with pytest.raises(InputError, match="ExportPrefix exports the prefix of OffsitePrefixTuning"):
        trainer(tmp_path, max_steps=1, callbacks=[ExportPrefix()]).fit(
            EmulatorDistillation("random:tiny", emulator=EmulatorSpec([0, 1, 3], identical=2)), data(rows_file)
        )
