import pytest
from lightning.pytorch import Trainer

from fulgurite.callbacks import SoftLabelWriter
from fulgurite.datamodules import InstructionDataModule, TextDataModule
from fulgurite.datamodules.soft_labels import SoftLabelStore
from fulgurite.errors import InputError
from fulgurite.modules import LanguageModel, SoftLabelTeacher
from fulgurite.modules.distillation import LabelSettings


def capture(folder, data, stop_after=None, precision="32-true", **settings):
    writer = SoftLabelWriter(str(folder), **settings)
    run = Trainer(
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder.parent,
        callbacks=[writer],
        limit_predict_batches=stop_after,
    )
    run.predict(SoftLabelTeacher("random:tiny", selection=LabelSettings(k=7)), data, return_predictions=False)
    return writer


def text(text_file):
    return TextDataModule(str(text_file), block_size=64, batch_size=4)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_stopped_capture_goes_on_without_predicting_again(tmp_path, text_file):
    whole = capture(tmp_path / "whole", text(text_file))
    first = capture(tmp_path / "parts", text(text_file), stop_after=5)
    rest = capture(tmp_path / "parts", text(text_file))
    assert first.captured_tokens == 5 * 4 * 63
    assert first.captured_tokens + rest.captured_tokens == whole.captured_tokens
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert capture(tmp_path / "parts", text(text_file)).captured_tokens == 0


def test_labels_do_not_depend_on_the_trainers_precision(tmp_path, text_file):
    capture(tmp_path / "one", text(text_file), stop_after=2)
    capture(tmp_path / "two", text(text_file), stop_after=2, precision="bf16-mixed")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with pytest.raises(InputError, match=r"trainer.precision='16-true' would turn the teacher's weights into float16"):
        capture(tmp_path / "three", text(text_file), precision="16-true")
    assert not (tmp_path / "three").exists()


def test_instruction_rows_keep_labels_of_responses_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Sand?", "response": "Glass."}\n{"prompt": "Longer question?", "response": "No."}\n')
    data = InstructionDataModule(str(path), val_fraction=0, predict_split="train")
    capture(tmp_path / "labels", data)
    store = SoftLabelStore(tmp_path / "labels")
    assert len(store) == 2
    for key in store.keys:
        example = store.example(key)
        assert len(example["soft_labels"]) == int((example["labels"] != -100).sum())
        assert int((example["labels"] == -100).sum()) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tokens": "no"}, "tokens='no'"), ({"compression": 20}, "compression=20"), ({"shard_bytes": 1}, "shard_bytes=1")],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        SoftLabelWriter("somewhere", **settings)


def test_only_a_teacher_is_captured(tmp_path):
    with pytest.raises(InputError, match="not LanguageModel"):
        SoftLabelWriter(str(tmp_path)).setup(None, LanguageModel("random:tiny"), "predict")


def test_memory_does_not_grow_with_the_text(tmp_path, text_file):
    """Nothing of an earlier batch is alive when a later one is written."""
    import gc

    from fulgurite.modules.distillation.labels import SoftLabels

    alive = []

    class Count(SoftLabelWriter):
        def write_on_batch_end(self, *arguments):
            super().write_on_batch_end(*arguments)
            gc.collect()
            alive.append(sum(isinstance(thing, SoftLabels) for thing in gc.get_objects()))

    run = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[Count(str(tmp_path / "s"))],
    )
    data = TextDataModule(str(text_file), block_size=512, batch_size=2)
    run.predict(SoftLabelTeacher("random:tiny"), data, return_predictions=False)
    assert len(alive) > 8
    assert max(alive) == alive[0]
