import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from fulgurite.callbacks import SoftLabelWriter
from fulgurite.datamodules import SoftLabelDataModule, TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import SoftLabelDistillation, SoftLabelTeacher
from fulgurite.modules.distillation import LabelSettings
from fulgurite.modules.student import StudentSpec
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer


def trainer(folder, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, enable_checkpointing=False, **{**quiet, "max_epochs": 1, **settings})


def text(text_file, **settings):
    return TextDataModule(str(text_file), **{"block_size": 64, "batch_size": 4, "train_tokens": 64 * 24, **settings})


@pytest.fixture
def teacher_folder(tmp_path):
    """A teacher that is not the student: same tokenizer, other weights."""
    tiny_model(seed=7).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def capture(folder, source, data, settings, **writer):
    run = trainer(folder, callbacks=[SoftLabelWriter(str(folder / "labels"), **writer)])
    run.predict(SoftLabelTeacher(source, selection=settings), data, return_predictions=False)
    return str(folder / "labels")


def student(**settings):
    return SoftLabelDistillation(
        "random:tiny", student=StudentSpec([0, 3]), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **settings
    )


def losses_of(folder, model, data):
    from lightning.pytorch import Callback

    seen = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

    seed_everything(0)
    trainer(folder, callbacks=[Record()]).fit(model, data)
    return seen


@pytest.mark.parametrize(("codec", "rounding"), [("plain-1", 1e-5), ("ranked-2", 2e-3)])
@pytest.mark.parametrize(
    "settings",
    [
        LabelSettings(k=12),
        LabelSettings(selection="adaptive", threshold=0.8, temperature=2.0),
        LabelSettings(selection="sampled", theta=0.1),
        LabelSettings(selection="random", k=20),
    ],
)
def test_stored_labels_train_like_the_online_teacher(tmp_path, text_file, teacher_folder, settings, codec, rounding):
    store = capture(tmp_path, teacher_folder, text(text_file), settings, codec=codec)
    online = losses_of(tmp_path, student(teacher=teacher_folder, selection=settings), text(text_file))
    stored = losses_of(tmp_path, student(), SoftLabelDataModule(store, val_fraction=0, batch_size=4))
    assert len(online) == 6
    assert stored == pytest.approx(online, rel=rounding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "reverse_kl"}, "divergence='reverse_kl' with selection='sampled'"),
        ({"remainder": "renormalize"}, "remainder='re"),
    ],
)
def test_sampled_labels_are_refused_where_they_would_teach_wrongly(tmp_path, text_file, teacher_folder, settings, message):
    sampled = LabelSettings(selection="sampled", theta=0.1)
    with pytest.raises(InputError, match=message):
        student(teacher=teacher_folder, selection=sampled, **settings)
    store = capture(tmp_path, teacher_folder, text(text_file), sampled)
    with pytest.raises(InputError, match=message):
        losses_of(tmp_path, student(**settings), SoftLabelDataModule(store, val_fraction=0, batch_size=4))
    with pytest.raises(InputError, match="values='log' would round"):
        capture(tmp_path / "log", teacher_folder, text(text_file), sampled, values="log")
    assert not (tmp_path / "log" / "labels").exists()


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"divergence": "jensen_shannon"}, LabelSettings(k=5), "does not split into the kept tokens and the tail"),
        ({}, LabelSettings(k=5, temperature=2.0), "the text is no sample of a tempered distribution"),
    ],
)
def test_text_in_the_tail_is_refused_where_it_is_no_sample(teacher_folder, settings, labels, message):
    with pytest.raises(InputError, match=message):
        student(teacher=teacher_folder, selection=labels, remainder="text_tail", **settings)


@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_stores_to_validate_on_are_checked_too(tmp_path, text_file, teacher_folder, stage):
    plain = capture(tmp_path / "plain", teacher_folder, text(text_file), LabelSettings(k=5))
    sampled = capture(tmp_path / "sampled", teacher_folder, text(text_file), LabelSettings(selection="sampled", theta=0.1))
    data = SoftLabelDataModule(plain, val_store=sampled, batch_size=4)
    with pytest.raises(InputError, match="divergence='reverse_kl' with selection='sampled'"):
        getattr(trainer(tmp_path), stage)(student(divergence="reverse_kl"), datamodule=data)


@pytest.mark.parametrize("settings", [{"chunk_weight": 0.5}, {"third_vocabulary": True}])
def test_forms_for_stores_are_refused_with_an_online_teacher(teacher_folder, settings):
    with pytest.raises(InputError, match="not for an online teacher"):
        student(teacher=teacher_folder, **settings)


def test_store_outlives_its_text(tmp_path, text_file, teacher_folder):
    store = capture(tmp_path, teacher_folder, text(text_file), LabelSettings(k=8))
    before = losses_of(tmp_path, student(), SoftLabelDataModule(store, val_fraction=0, batch_size=4))
    text_file.unlink()
    assert losses_of(tmp_path, student(), SoftLabelDataModule(store, val_fraction=0, batch_size=4)) == before


def test_external_tokens_are_joined_with_the_text(tmp_path, text_file, teacher_folder):
    within = capture(tmp_path / "a", teacher_folder, text(text_file), LabelSettings(k=8))
    without = capture(tmp_path / "b", teacher_folder, text(text_file), LabelSettings(k=8), tokens="external")
    expected = losses_of(tmp_path, student(), SoftLabelDataModule(within, val_fraction=0, batch_size=4))
    joined = losses_of(tmp_path, student(), SoftLabelDataModule(without, text=text(text_file), batch_size=4))
    assert joined == expected
    with pytest.raises(InputError, match="tokens: external"):
        losses_of(tmp_path, student(), SoftLabelDataModule(without, batch_size=4))
    with pytest.raises(InputError, match="no labels for sequence"):
        losses_of(tmp_path, student(), SoftLabelDataModule(without, text=text(text_file, block_size=32), batch_size=4))


def test_distillation_brings_the_student_to_its_teacher(tmp_path, text_file, teacher_folder):
    figures = {}
    for weight in (0.0, 1.0):
        seed_everything(0)
        run = trainer(tmp_path, max_epochs=4)
        model = student(teacher=teacher_folder, selection=LabelSettings(selection="full"), soft_weight=weight)
        run.fit(model, text(text_file))
        figures[weight] = {name: float(value) for name, value in run.callback_metrics.items()}
    assert figures[1.0]["val_kl"] < 0.7 * figures[0.0]["val_kl"]
    assert figures[0.0]["val_loss"] < figures[1.0]["val_loss"]


def test_teacher_is_no_part_of_the_student(teacher_folder):
    model = student(teacher=teacher_folder)
    model.configure_model()
    layers = {name.split(".")[3] for name in model.state_dict() if ".layers." in name}
    assert layers == {"0", "1"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_labels_at_all_are_refused(tmp_path, text_file):
    with pytest.raises(InputError, match="SoftLabelDataModule"):
        trainer(tmp_path).fit(student(), text(text_file))
    data = text(text_file, tokenizer="random:tiny")
    data.prepare_data()
    data.setup()
    loader = torch.utils.data.DataLoader(data.train_set, batch_size=4)  # which says nothing of labels
    with pytest.raises(InputError, match="SoftLabelDataModule"):
        trainer(tmp_path).fit(student(), loader)


def test_teacher_with_another_tokenizer_is_refused(tmp_path, text_file):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["sand"])
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        trainer(tmp_path).fit(student(teacher=str(tmp_path / "other")), text(text_file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_weight": 1.5}, "soft_weight=1.5"),
        ({"divergence": "kl"}, "divergence='kl'.*forward_kl"),
        ({"remainder": "drop"}, "remainder='drop'.*tail_bucket"),
        ({"divergence": "reverse_kl", "remainder": "renormalize"}, "infinite"),
        ({"selection": LabelSettings(threshold=2.0)}, "threshold=2.0"),
        ({"teacher": "random:tyni"}, "random:tiny"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(settings, message):
    with pytest.raises(InputError, match=message):
        student(**settings)


def test_k_beyond_the_vocabulary_is_refused_before_weights_are_read():
    with pytest.raises(InputError, match="k=300 .*1 to 259"):
        SoftLabelTeacher("random:tiny", selection=LabelSettings(k=300))
    with pytest.raises(InputError, match="never stored"):
        SoftLabelTeacher("random:tiny", selection=LabelSettings(selection="full"))
