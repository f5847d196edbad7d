"""What is said of a training before it starts, against the training."""

import dataclasses
import json

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import Qwen2Config

from fulgurite.callbacks import TrainUntilCondition
from fulgurite.datamodules import InstructionDataModule, MultiTaskDataModule, TextDataModule, TextTask
from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.experiments.estimate import Plan, needs, plan_of
from fulgurite.modules import (
    EmulatorDistillation,
    FusionCompression,
    LanguageModel,
    MultiTask,
    OffsitePrefixTuning,
    SoftLabelDistillation,
    SpanPruning,
)
from fulgurite.modules.fusion import FusionShape, LearnedFusion
from fulgurite.modules.offsite import EmulatorSpec, PrefixSettings
from fulgurite.modules.precision import fast_in_bfloat16
from fulgurite.modules.pretrained import load_config
from fulgurite.modules.student import LayerChoice, StudentSpec

PLAN = Plan(rows=2, length=32, precision="32-true", devices=1, sharded=False, accumulate=1, steps=None)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture
def data(long_documents):
    return TextDataModule(long_documents, block_size=32, batch_size=2, val_fraction=0.2)


def trained_by(module, data):
    """The trainable parameters of each stage of a real training."""
    found = []

    class Count(TrainUntilCondition):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            shared = {id(weight): weight.numel() for weight in pl_module.parameters() if weight.requires_grad}
            if not found or found[-1] != sum(shared.values()):
                found.append(sum(shared.values()))

    Trainer(max_steps=4, accelerator="cpu", callbacks=[Count(max_steps=1)], **QUIET).fit(module, data)
    return found


SYSTEMS = {
    "model": lambda: LanguageModel("random:tiny"),
    "student": lambda: LanguageModel("random:tiny", student=StudentSpec(keep_layers=LayerChoice(2))),
    "fresh": lambda: LanguageModel("random:tiny", student=StudentSpec(fresh={"num_hidden_layers": 1, "hidden_size": 64})),
    "distillation": lambda: SoftLabelDistillation("random:tiny", teacher="random:tiny"),
    "emulator": lambda: EmulatorDistillation("random:tiny", emulator=EmulatorSpec(layers=3, identical=1)),
    "prefix": lambda: OffsitePrefixTuning("random:tiny", prefix=PrefixSettings(length=4)),
    "key-value prefix": lambda: OffsitePrefixTuning("random:tiny", prefix=PrefixSettings("key_values", 4)),
    "fusion": lambda: FusionCompression(
        "random:tiny",
        shape=FusionShape(num_hidden_layers=2, intermediate_size=48),
        start=LearnedFusion(calibration_tokens=64),
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_trained_is_what_was_said(data, name):
    expected = trained_by(SYSTEMS[name](), data)
    found = needs(SYSTEMS[name](), data, PLAN)
    assert [need.trained for need in found] == expected
    for need in found:
        assert need.gradients == 4 * need.trained
        assert need.optimizer == pytest.approx(2 * need.gradients, rel=0.05) or name == "fusion"
        assert need.activations > 0
        assert need.operations > 0
        assert need.memory == need.weights + need.gradients + need.optimizer + need.activations


def test_other_systems_say_it_too(long_documents, data):
    tasks = MultiTaskDataModule({"text": TextTask(long_documents, length=48)}, batch_size=4)
    (several,) = needs(MultiTask("random:tiny"), tasks, PLAN)
    assert trained_by(MultiTask("random:tiny"), tasks) == [pytest.approx(several.trained, rel=0.01)]  # but for classes
    (spans,) = needs(SpanPruning("random:tiny", kl_weight=0.5), data, PLAN)
    (dense,) = needs(LanguageModel("random:tiny"), data, PLAN)
    assert spans.weights == dense.weights * (3 if fast_in_bfloat16() else 4) // 2  # the dense model in the type that is fast


def test_activations_are_those_that_autograd_keeps(data):
    (need,) = needs(LanguageModel("random:tiny"), data, PLAN)
    module = LanguageModel("random:tiny")
    module.configure_model()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = module.model.base_model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)[0]
    assert states.requires_grad
    head = module.model.get_input_embeddings().weight
    of_the_loss = 4 * (head.numel() + 2 * 64 * len(head))
    assert need.activations == pytest.approx(sum(kept.values()) + of_the_loss, rel=0.1)


def test_checkpoints_keep_less_and_compute_more(data):
    (whole,), (less,) = (needs(LanguageModel("random:tiny", gradient_checkpointing=on), data, PLAN) for on in (False, True))
    assert less.activations < 0.6 * whole.activations
    assert 1.2 * whole.operations < less.operations < 1.4 * whole.operations  # a third, but for the head
    assert less.weights == whole.weights


def test_teachers_take_their_time_and_frozen_heads_none(data):
    (alone,) = needs(LanguageModel("random:tiny"), data, PLAN)
    (taught,) = needs(SoftLabelDistillation("random:tiny", teacher="random:tiny"), data, PLAN)
    assert taught.operations == pytest.approx(4 / 3 * alone.operations, rel=0.02)
    shorter = StudentSpec(keep_layers=LayerChoice(3))
    (student,) = needs(SoftLabelDistillation("random:tiny", teacher="random:tiny", student=shorter), data, PLAN)
    (emulator,) = needs(EmulatorDistillation("random:tiny", emulator=EmulatorSpec(layers=3, identical=1)), data, PLAN)
    head = load_config("random:tiny").vocab_size * load_config("random:tiny").hidden_size
    assert emulator.operations < student.operations - 0.9 * 2 * 64 * head
    assert emulator.activations <= student.activations - 4 * head


def test_an_estimate_for_a_gpu_is_in_its_types(tmp_path, monkeypatch, capsys, long_documents):
    if torch.cuda.is_available() or fast_in_bfloat16():
        pytest.skip("auto means the same here")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", "distillation/online", *(f"--model.{one}=random:tiny" for one in ("source", "teacher"))]
    words += ["--model.student=null"]
    found = {}
    for kind in ("cpu", "gpu"):
        done = run([*words, f"--data.train={long_documents}", f"--trainer.accelerator={kind}", "--dry_run=true"])
        found[kind], said = done.needs[0], capsys.readouterr().out
        assert ("bf16-mixed" in said) == (kind == "gpu")
    assert found["cpu"].weights - found["gpu"].weights == found["cpu"].weights // 4  # of two models alike, the teacher in half
    assert fast_in_bfloat16("cpu") is False


def test_a_processor_is_one_device_whatever_gpus_there_are(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    counts = [plan_of({"devices": "auto", "accelerator": kind, "max_steps": 1}, data).devices for kind in ("cpu", "gpu")]
    assert counts == [1, 8]


def test_devices_share_or_repeat(data):
    one, each, shared = (
        needs(LanguageModel("random:tiny"), data, Plan(2, 32, "bf16-mixed", devices, sharded, 1, None))[0]
        for devices, sharded in ((1, False), (4, False), (4, True))
    )
    assert each.weights == one.weights
    assert each.gradients == 2 * one.gradients  # and the buckets
    assert (one.sent, each.sent, shared.sent) == (0, int(1.5 * one.weights), int(2.25 * one.weights))
    assert shared.optimizer == one.optimizer // 4
    assert one.weights / 4 < shared.weights < one.weights


def test_the_command_says_it_and_leaves_nothing(tmp_path, monkeypatch, capsys, long_documents):
    monkeypatch.chdir((tmp_path / "work").mkdir() or tmp_path / "work")
    words = ["fit", "-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={long_documents}"]
    monkeypatch.setattr("fulgurite.experiments.estimate.console.width", 160)
    run([*words, "--trainer.max_steps=100", "--trainer.devices=8", "--trainer.strategy=fsdp", "--dry_run=true"])
    said = capsys.readouterr().out
    assert "8 devices, weights divided among them" in said
    assert "100 steps: up to" in said
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(InputError, match="--dry_run is for fit, not for validate"):
        run(["validate", *words[1:], "--dry_run=true"])


def test_what_is_of_another_kind_is_not_estimated(tmp_path, monkeypatch, long_documents):
    monkeypatch.chdir(tmp_path)
    data = ["--data=TextDataModule", f"--data.train={long_documents}"]
    with pytest.raises(InputError, match="--dry_run knows nothing of SoftLabelTeacher, which is no PretrainedModule"):
        run(["fit", "--dry_run=true", "--model=SoftLabelTeacher", "--model.source=random:tiny", *data])


def test_logits_of_a_gpu_are_counted_in_its_chunks(data):
    plans = (PLAN, dataclasses.replace(PLAN, rows=8, device="cuda"), dataclasses.replace(PLAN, rows=8))
    _, larger, smaller = (needs(LanguageModel("random:tiny"), data, plan)[0].activations for plan in plans)
    assert larger - smaller == 4 * 2 * (8 * 32 - 64) * 259


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.devices=0"], "trainer.devices='0' is no number of devices. Legal: 1 or more"),
        (["--trainer.devices=[]"], r"trainer.devices=\[\] is no number of devices"),
        (["--trainer.strategy=fdsp"], "trainer.strategy='fdsp' is unknown. Did you mean 'fsdp'"),
        (
            ["--model=SpanPruning", "--model.source=random:tiny", "--trainer.strategy=fsdp"],
            "splits the weights, and heads are profiled on whole ones",
        ),
    ],
)
def test_what_could_not_run_is_not_estimated(tmp_path, monkeypatch, long_documents, words, message):
    monkeypatch.chdir(tmp_path)
    start = ["fit", "-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={long_documents}"]
    with pytest.raises(InputError, match=message):
        run([*start, "--dry_run=true", *words])
    if "fdsp" in words[-1]:
        with pytest.raises(InputError, match="trainer: You selected an invalid strategy name: `strategy='fdsp'`"):
            run([*start, *words])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "layers"),
    [
        (
            "fusion/large",
            {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
            36,
        ),
        ("distillation/large", {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}, 28),
    ],
)
def test_large_configs_fit_on_gpus_of_80_gigabytes(tmp_path, monkeypatch, long_documents, name, sizes, layers):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fulgurite.experiments.estimate.operations_per_second", lambda config, plan: 1e14)
    tied = name.startswith("fusion")
    config = Qwen2Config(
        vocab_size=151936, num_hidden_layers=layers, tie_word_embeddings=tied, **{"num_key_value_heads": 4, **sizes}
    )
    config.save_pretrained(tmp_path / "large")
    words = ["fit", "-c", name, f"--model.source={tmp_path / 'large'}", "--trainer.devices=8", "--dry_run=true"]
    if name == "distillation/large":  # a store as long as its sequences
        words += ["--data=TextDataModule", "--data.block_size=2048"]
    needs = run([*words, f"--data.train={long_documents}"]).needs
    assert max(need.memory for need in needs) < 75 * 2**30
    assert needs[-1].trained > 2 * 10**9


def test_instructions_are_as_long_as_they_may_be(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    data = InstructionDataModule(str(tmp_path / "a.jsonl"), max_length=77)
    assert data.longest_sequence == 77
