"""The callback in a Trainer; the model is a user's own, not of this package."""

import time

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from fulgurite.callbacks import Adaptive, FixedRate, GradientPruning, PruningPolicy
from fulgurite.errors import InputError


class Own(LightningModule):
    """Somebody's regression."""

    def __init__(self, unused=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.unused = nn.Linear(10, 10) if unused else None

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.layers(batch[:, :20]), batch[:, :3].sum(dim=1, keepdim=True))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    rows = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(rows, batch_size=8)


def fit(tmp_path, callback, *, model=None, ranks=1, ckpt_path=None, strategy=None, callbacks=(), rows=None, **settings):
    if ranks > 1 and torch.cuda.is_available():
        pytest.skip("a fork has no CUDA")
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or ("auto" if ranks == 1 else DDPStrategy(start_method="fork", process_group_backend="gloo")),
        callbacks=[*([callback] if callback else []), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_steps": 12, "enable_checkpointing": bool(callbacks), **settings},
    )
    model = model or Own()
    trainer.fit(model, data() if rows is None else rows, ckpt_path=ckpt_path)
    return trainer, model


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1},
        {"strategy": {"find_unused_parameters": True}, "unused": True},
        {"strategy": {"static_graph": True}},
    ],
    ids=["plain", "accumulation", "bf16-mixed", "clipping", "find_unused_parameters", "static_graph"],
)
def test_two_ranks_stay_equal_with_every_feature_of_the_trainer(tmp_path, case):
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **case.pop("strategy", {}))
    model = Own(unused=case.pop("unused", False))
    before = weights(model).clone()
    callback = GradientPruning(FixedRate(0.9), warmup=2, check_every=1, clip=5.0)  # stops where replicas differ
    trainer, _ = fit(tmp_path, callback, model=model, ranks=2, strategy=strategy, **case)
    assert trainer.callback_metrics["prune_rate"] == pytest.approx(0.9)
    assert trainer.callback_metrics["bandwidth_mbit"] > 0
    assert not torch.equal(weights(model), before)


def test_rate_0_with_float32_is_bitwise_plain_ddp(tmp_path):
    _, plain = fit(tmp_path, None, ranks=2)
    _, ours = fit(tmp_path, GradientPruning(FixedRate(0.0), dense_format="float32"), ranks=2)
    assert torch.equal(weights(plain), weights(ours))


def test_a_run_that_goes_on_ends_as_an_uninterrupted_one(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        saving = ModelCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=8, save_top_k=-1, filename="{step}")
        callback = GradientPruning(FixedRate(0.9, ramp_steps=6), warmup=2)
        steps = {"max_steps": -1, "max_epochs": epochs, "limit_train_batches": 4}
        return weights(fit(tmp_path, callback, ranks=2, callbacks=[saving], ckpt_path=ckpt_path, **steps)[1])

    whole = run("whole", 4)
    run("parts", 2)
    assert not torch.equal(run("parts", 3, tmp_path / "parts" / "step=8.ckpt"), whole)
    assert torch.equal(run("parts", 4, tmp_path / "parts" / "step=8.ckpt"), whole)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_goes_on_from_files_of_what_each_rank_kept_back(tmp_path, momentum):
    """One bucket in one order, so that a run that goes on selects as an uninterrupted one does."""

    def run(folder, epochs, ckpt_path=None):
        saving = ModelCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        callback = GradientPruning(FixedRate(0.9), warmup=2, at_checkpoint="save", momentum=momentum)
        steps = {"max_steps": -1, "max_epochs": epochs, "limit_train_batches": 4}
        return weights(fit(tmp_path / folder, callback, callbacks=[saving], ckpt_path=ckpt_path, **steps)[1])

    whole = run("whole", 4)
    run("parts", 2)
    assert torch.equal(run("parts", 4, tmp_path / "parts" / "step=8.ckpt"), whole)
    kept = [file.parent.name.partition("-")[0] for file in (tmp_path / "parts" / "kept-back").rglob("rank-0.safetensors")]
    assert sorted(kept, key=int) == ["12", "16"]
    with pytest.raises(InputError, match=r"8-\w+/rank-0\.safetensors is missing.*at_checkpoint=drop"):
        run("parts", 4, tmp_path / "parts" / "step=8.ckpt")


def test_runs_in_one_folder_keep_files_of_their_own(tmp_path, caplog):
    def run(name, epochs, ckpt_path=None, at_checkpoint="save"):
        saving = ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        callback = GradientPruning(FixedRate(0.9), warmup=2, at_checkpoint=at_checkpoint)
        steps = {"max_steps": -1, "max_epochs": epochs, "limit_train_batches": 4}
        return weights(fit(tmp_path, callback, callbacks=[saving], ckpt_path=ckpt_path, **steps)[1])

    whole = run("long", 4)
    run("short", 3)
    assert torch.equal(run("again", 4, tmp_path / "long/step=12.ckpt"), whole)
    run("lost", 4, tmp_path / "long/step=12.ckpt", "flush")
    assert "at_checkpoint=flush: what ranks had not sent" in caplog.text


def test_a_callback_that_is_used_again_begins_anew(tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.seen.append(callback.exchange.rate)

    callback, rates = GradientPruning(FixedRate(0.9, ramp_steps=4), warmup=3), [Rates(), Rates()]
    for each in rates:
        fit(tmp_path, callback, callbacks=[each])
    assert rates[0].seen == rates[1].seen
    assert len(set(rates[0].seen)) > 3


def test_two_ranks_save_what_each_kept_back(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    callback = GradientPruning(FixedRate(0.9), warmup=2, at_checkpoint="save")
    fit(tmp_path, callback, ranks=2, callbacks=[saving])
    one, two = (safetensors.torch.load_file(next(tmp_path.glob(f"kept-back/12-*/rank-{rank}.safetensors"))) for rank in (0, 1))
    assert one.keys() == two.keys()
    assert not torch.equal(one["residual/layers.2.weight"], two["residual/layers.2.weight"])
    again = GradientPruning(FixedRate(0.9), warmup=2, at_checkpoint="save", check_every=1)
    fit(tmp_path, again, ranks=2, callbacks=[saving], ckpt_path=tmp_path / "step=6.ckpt")


def test_one_process_prunes_its_own_gradient(tmp_path):
    _, plain = fit(tmp_path, None)
    callback = GradientPruning(FixedRate(0.9), warmup=0, at_checkpoint="drop")
    trainer, pruned = fit(tmp_path, callback)
    assert not torch.equal(weights(plain), weights(pruned))
    assert callback.exchange.residuals
    assert trainer.callback_metrics["prune_rate"] == pytest.approx(0.9)
    _, dense = fit(tmp_path, GradientPruning(FixedRate(0.0)))
    assert torch.equal(weights(plain), weights(dense))


def test_warm_up_does_not_prune(tmp_path):
    seen = []

    class Noting(PruningPolicy):
        def decide(self, measurement, bytes_at):
            seen.append((measurement.step, measurement.rate))
            return 0.5

    fit(tmp_path, GradientPruning(Noting(), warmup=0.5, at_checkpoint="drop"))
    assert [step for step, _ in seen] == [*range(7, 13)]
    assert seen[0][1] == 0.0
    assert {rate for _, rate in seen[1:]} == {0.5}


def test_adaptive_leaves_a_fast_link_alone(tmp_path):
    callback = GradientPruning(Adaptive(), warmup=0)
    trainer, _ = fit(tmp_path, callback, ranks=1)
    assert trainer.callback_metrics["prune_rate"] == 0


class Validated(Own):
    """Computes for 20 ms a batch, and validates for 300."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.3)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1, 20))


class Timed(FixedRate):
    """Remembers the time of each step."""

    def decide(self, measurement, bytes_at):
        self.seconds = [*getattr(self, "seconds", []), measurement.step_seconds]
        return super().decide(measurement, bytes_at)


@pytest.mark.parametrize("batches", [1, 2])
def test_validation_is_no_part_of_a_step(tmp_path, batches):
    policy = Timed(0.9)
    settings = {"val_check_interval": 3, "accumulate_grad_batches": batches}
    trainer, _ = fit(tmp_path, GradientPruning(policy, warmup=0), model=Validated(), **settings)
    assert len(policy.seconds) == 12
    assert min(policy.seconds) >= 0.02 * batches
    assert max(policy.seconds) < 0.3
    assert trainer.callback_metrics["step_seconds"] < 0.3


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(torch.randn(64, 20, generator=torch.Generator().manual_seed(0)))


def stream():
    return torch.utils.data.DataLoader(Stream(), batch_size=8)


@pytest.mark.parametrize("saving", [{"every_n_epochs": 1}, {"every_n_train_steps": 5}])
def test_data_without_a_length_can_be_trained_on(tmp_path, saving):
    saving = ModelCheckpoint(dirpath=tmp_path, **saving)
    callback = GradientPruning(FixedRate(0.9), warmup=2)
    trainer, _ = fit(tmp_path, callback, callbacks=[saving], rows=stream(), max_steps=-1, max_epochs=2)
    assert trainer.global_step == 16
    flushed = saving._every_n_train_steps == 5  # the last step is behind a checkpoint
    assert trainer.callback_metrics["prune_rate"] == pytest.approx(0.0 if flushed else 0.9)
    assert callback.total_steps == 0


def test_momentum_acts_in_the_warm_up_on_one_process_too(tmp_path):
    weights = []
    for momentum in (0.0, 0.9):
        seed_everything(0, verbose=False)
        callback = GradientPruning(FixedRate(0.0), warmup=3, momentum=momentum, dense_format="float32")
        trainer, _ = fit(tmp_path, callback, max_steps=3)
        weights.append(torch.cat([one.detach().flatten() for one in trainer.lightning_module.parameters()]))
    assert not torch.equal(*weights)


def test_another_policy_than_the_checkpoints_begins_anew(caplog):
    kept = GradientPruning(FixedRate(0.9), warmup=2)
    kept.rate = 0.9
    other = GradientPruning(warmup=2)
    other.load_state_dict(kept.state_dict())
    assert "The checkpoint's policy was FixedRate: Adaptive begins anew." in caplog.text
    assert other.rate is None
    again = GradientPruning(FixedRate(0.5), warmup=2)
    again.load_state_dict(kept.state_dict())
    assert again.rate == 0.9


def test_a_share_of_a_run_of_unknown_length_is_no_warm_up(tmp_path):
    with pytest.raises(InputError, match=r"warmup=0\.05 is a share .*GradientPruning\(warmup=100\).*max_steps"):
        fit(tmp_path, GradientPruning(), rows=stream(), max_steps=-1, max_epochs=2)
    trainer, _ = fit(tmp_path, GradientPruning(), rows=stream(), max_steps=10, max_epochs=2)
    assert trainer.global_step == 10


class Manual(Own):
    """Manual optimisation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": Manual()}, "manual optimisation"),
        ({"strategy": FSDPStrategy()}, "strategy=FSDPStrategy.*FSDP"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, settings, message):
    trainer = Trainer(accelerator="cpu", callbacks=[GradientPruning()], logger=False, enable_checkpointing=False)
    if "strategy" in settings:
        trainer._accelerator_connector.strategy = settings["strategy"]
    with pytest.raises(InputError, match=message):
        trainer.callbacks[0].setup(trainer, settings.get("model", Own()), "fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, "warmup=-1"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"dense_format": "int8"}, "dense_format='int8'"),
        ({"clip": 0}, "clip=0"),
        ({"momentum": 1}, "momentum=1"),
        ({"dense_below": -1}, "dense_below=-1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GradientPruning(**settings)


class NextStage(Callback):
    """After five steps the module trains other weights, as fusion does from stage to stage."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            torch.manual_seed(1)
            pl_module.layers = Own().layers
            trainer.strategy.setup_optimizers(trainer)
            if isinstance(trainer.strategy, DDPStrategy):
                trainer.strategy.model = pl_module
                trainer.strategy.configure_ddp()

    def on_train_end(self, trainer, pl_module):
        kept_back = trainer.callbacks[0].exchange.residuals
        assert kept_back["layers.0.weight"].count_nonzero() > 0.8 * 1280


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_module_that_goes_on_with_other_weights_is_pruned_on(tmp_path, ranks):
    callback = GradientPruning(FixedRate(0.9), warmup=0, check_every=1, dense_below=64, at_checkpoint="drop")
    trainer, _ = fit(tmp_path, callback, ranks=ranks, callbacks=[NextStage()], enable_checkpointing=False)
    assert trainer.callback_metrics["prune_rate"] == pytest.approx(0.9)


class ByItself(Own):
    """Averages gradients without DDP, as the Jacobian of several tasks does."""

    def training_step(self, batch, batch_idx):
        self.trainer.strategy.model.require_backward_grad_sync = False
        return super().training_step(batch, batch_idx)


def test_a_module_that_exchanges_gradients_by_itself_is_refused(tmp_path):
    with pytest.raises(Exception, match="has nothing to send: ByItself exchanges its gradients by itself"):
        fit(tmp_path, GradientPruning(), model=ByItself(), ranks=2)
