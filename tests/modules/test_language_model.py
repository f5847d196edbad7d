import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.callbacks import FixedRate, GradientPruning
from fulgurite.datamodules import TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import FusionCompression, LanguageModel, SoftLabelDistillation, WarmupCosine
from fulgurite.modules.fusion import FusionShape
from fulgurite.modules.language_model import GenerationSettings
from fulgurite.modules.student import LayerChoice, StudentSpec


def trainer(folder, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, "max_epochs": 1, **settings})


def build(**settings):
    return LanguageModel("random:tiny", optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"lr_scheduler": WarmupCosine}],
)
def test_training_lowers_the_loss(tmp_path, text_file, settings):
    seed_everything(0)
    model = build(**settings)
    run = trainer(tmp_path, accumulate_grad_batches=2, precision="bf16-mixed", max_epochs=3)
    run.fit(model, TextDataModule(str(text_file), block_size=64, batch_size=8))
    figures = run.callback_metrics
    assert figures["val_loss"] < 4.0 < math.log(259)
    assert float(figures["val_perplexity"]) == pytest.approx(math.exp(figures["val_loss"]), rel=1e-4)
    # Every token of the byte tokenizer is one byte, but for the ends of documents.
    assert float(figures["val_bits_per_byte"]) == pytest.approx(float(figures["val_loss"]) / math.log(2), rel=0.05)


def test_fused_optimizers_are_clipped_in_mixed_precision(tmp_path, text_file):
    model = LanguageModel("random:tiny", optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=True))
    run = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1e-3, max_steps=1, limit_val_batches=0)
    model.configure_model()
    before = torch.cat([weight.detach().flatten() for weight in model.model.parameters()])
    run.fit(model, TextDataModule(str(text_file), block_size=64, batch_size=8))
    after = torch.cat([weight.detach().flatten() for weight in model.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=0.01)


def test_validation_equals_transformers_own_loss(tmp_path, text_file):
    model = build()
    data = TextDataModule(str(text_file), block_size=64, batch_size=4, append_eos=False, val_fraction=0.2)
    figures = trainer(tmp_path).validate(model, data, verbose=False)[0]
    losses = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            for row in range(len(batch["input_ids"])):
                ids = batch["input_ids"][row : row + 1]
                losses.append(model.model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert figures["val_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", [LanguageModel, SoftLabelDistillation])
def test_checkpoint_of_plain_python_loads_with_weights_only(tmp_path, text_file, kind):
    model = kind("random:tiny", student=StudentSpec(LayerChoice(2)), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run = trainer(tmp_path, max_steps=2)
    if kind is SoftLabelDistillation:
        model.on_fit_start, model.soft_weight = lambda: None, 0.0  # hard labels only
    run.fit(model, TextDataModule(str(text_file), block_size=64))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.model.config.num_hidden_layers == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize(
    "callbacks", [[], [GradientPruning(FixedRate(0.5), warmup=0.2, at_checkpoint="save")]], ids=["plain", "pruned"]
)
def test_a_run_of_epochs_goes_on_in_the_middle_of_one(tmp_path, text_file, callbacks):
    """Also where schedules and callbacks ask how long the run is."""
    data = TextDataModule(str(text_file), block_size=64, batch_size=2, seed=0)
    ends = []
    for place in (None, tmp_path / "step=5.ckpt"):
        seed_everything(0)
        model = build(lr_scheduler=WarmupCosine)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        run = trainer(tmp_path, max_epochs=2, callbacks=[*callbacks, keep])
        run.fit(model, data, ckpt_path=place, weights_only=True if place else None)
        ends.append((run.global_step, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    (steps, whole), (again, parts) = ends
    assert steps == again > 10
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_checkpoint_of_another_model_is_refused(tmp_path, text_file):
    data = {"block_size": 64}
    run = trainer(tmp_path, max_steps=1)
    run.fit(build(), TextDataModule(str(text_file), **data))
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"checkpoint is of another model.*layers\.2"):
        trainer(tmp_path, max_steps=2).fit(
            build(student=StudentSpec([0, 1])), TextDataModule(str(text_file), **data), ckpt_path=tmp_path / "model.ckpt"
        )


def test_predict_writes_text(tmp_path, text_file):
    model = build(generation=GenerationSettings(max_new_tokens=5, prompt_tokens=10))
    data = TextDataModule(str(text_file), block_size=64, batch_size=3, predict_split="val", val_fraction=0.2)
    rows = [row for batch in trainer(tmp_path).predict(model, data) for row in batch]
    assert len(rows) == len(data.val_set)
    assert len(rows[0]["prompt"]) == 10
    assert all(isinstance(row["text"], str) for row in rows)


def test_left_padded_prompts_are_answered_as_alone():
    model = build(generation=GenerationSettings(max_new_tokens=6))
    model.configure_model()
    model.model.eval()
    prompts = ["sand", "lightning strikes"]
    ids = [torch.tensor(model.tokenizer(prompt).input_ids) for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in ids])
    together = model.predict_step({"input_ids": padded, "attention_mask": (padded != 0).long()}, 0)
    alone = [model.predict_step({"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}, 0)[0] for row in ids]
    assert together == alone
    assert [row["prompt"] for row in together] == prompts


def test_padding_behind_a_row_is_no_part_of_its_prompt():
    model = build(generation=GenerationSettings(max_new_tokens=6, prompt_tokens=12))
    model.configure_model()
    model.model.eval()
    ids = [torch.tensor(model.tokenizer(prompt).input_ids) for prompt in ("sand", "lightning strikes the sand")]
    lengths = torch.tensor([len(row) for row in ids])
    batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), "lengths": lengths}
    together = model.predict_step(batch, 0)
    assert together == [model.predict_step({"input_ids": row[None]}, 0)[0] for row in ids]
    assert [row["prompt"] for row in together] == ["sand", "lightning st"]


@pytest.mark.parametrize("kind", [LanguageModel, FusionCompression])
def test_a_schedule_without_a_length_is_refused_at_the_start(tmp_path, text_file, kind):
    settings = {"shape": FusionShape(intermediate_size=48)} if kind is FusionCompression else {}
    model = kind("random:tiny", lr_scheduler=WarmupCosine, **settings)
    run = trainer(tmp_path, max_epochs=-1, max_time="00:00:01:00", limit_val_batches=0)
    with pytest.raises(InputError, match=r"nothing says how many steps it has. Give trainer\.max_steps"):
        run.fit(model, TextDataModule(str(text_file), block_size=64, batch_size=8))
    assert run.global_step == 0


def test_a_run_that_gets_more_steps_gets_their_schedule(tmp_path, text_file):
    def rates(steps, checkpoint=None):
        seen = []

        class Record(Callback):
            def on_train_batch_start(self, trainer, *_):
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        run = trainer(tmp_path, max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=[Record()])
        data = TextDataModule(str(text_file), block_size=64, batch_size=8)
        run.fit(build(lr_scheduler=WarmupCosine), data, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return seen

    rates(4)
    assert rates(8, tmp_path / "4.ckpt") == pytest.approx(rates(8)[4:])


def test_a_loss_that_is_no_number_is_not_hidden():
    for mean in (build().mean_loss, SoftLabelDistillation("random:tiny").mean_kl):
        mean.update(torch.tensor(5.0), 10)
        mean.update(torch.tensor(2.0), 20)
        assert float(mean.compute()) == 3.0
        mean.update(torch.tensor(math.nan), 10)
        assert math.isnan(mean.compute())


@pytest.mark.slow
def test_compiled_training_gives_the_same_loss(tmp_path, text_file):
    losses = []
    for compiled in (False, True):
        seed_everything(0)
        run = trainer(tmp_path, max_steps=3)
        run.fit(build(compile=compiled), TextDataModule(str(text_file), block_size=64))
        losses.append(float(run.callback_metrics["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens=0"),
        ({"generation": GenerationSettings(max_new_tokens=0)}, "max_new_tokens=0"),
        ({"generation": GenerationSettings(temperature=-1)}, "temperature=-1"),
        ({"generation": GenerationSettings(top_p=0)}, "top_p=0"),
        ({"student": StudentSpec([9])}, r"keep_layers=\[9\]"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(settings, message):
    with pytest.raises(InputError, match=message):
        build(**settings)
