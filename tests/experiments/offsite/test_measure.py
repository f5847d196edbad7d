"""The rungs of the ladder, and the attack, on the tiny model."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from fulgurite.callbacks import ExportPretrained
from fulgurite.datamodules import TextDataModule
from fulgurite.errors import InputError
from fulgurite.experiments.offsite import measure
from fulgurite.experiments.offsite.inversion import guess, inversion
from fulgurite.experiments.offsite.measure import rung
from fulgurite.modules import EmulatorDistillation
from fulgurite.modules.offsite import EmulatorSpec
from tests.conftest import prose


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("ladder")
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": f"{split} {n}", "response": (" negative", " positive")[n % 2]}) + "\n" for n in range(12)]
        (root / f"{split}.jsonl").write_text("".join(lines))
    (root / "text.txt").write_text(prose(300))
    module = EmulatorDistillation("random:tiny", emulator=EmulatorSpec([0, 1, 3], identical=1))
    export = ExportPretrained(str(root / "emulator"))
    trainer = Trainer(max_steps=0, accelerator="cpu", logger=False, callbacks=[export], enable_checkpointing=False)
    trainer.fit(module, TextDataModule(str(root / "text.txt"), block_size=64))
    common = {"task": "sst2", "full": "random:tiny", "emulator": str(root / "emulator"), "rows": str(root), "seed": 0}
    sizes = {
        "prefix": "key_values",
        "length": 2,
        "batch_size": 4,
        "tune_steps": 4,
        "split_steps": 2,
        "tune_rate": 1e-2,
        "split_rate": 1e-2,
    }
    return {**common, **sizes}


def test_every_rung_gives_its_figures_and_one_emulators_prefix_is_tuned_once(settings, monkeypatch):
    fits = []
    monkeypatch.setattr(measure.Ladder, "fit", lambda *a, fit=measure.Ladder.fit, **k: fits.append(a[2]) or fit(*a, **k))
    found = {kind: rung(kind=kind, **settings) for kind in measure.RUNGS}
    assert all(0 <= one["accuracy"] <= 1 and one["loss"] > 0 for one in found.values())
    assert fits.count(4) == 1, "one prefix for emulator, plug-in and split"
    assert (fits.count(2), fits.count(1)) == (1 + 2, 2 * 2), (
        "the split's steps; two parties' halves of both phases, in two rounds"
    )
    assert found["zero"]["tokens"] == 0
    assert 0 < found["emulator"]["tokens"] == found["plug-in"]["tokens"] < found["split"]["tokens"], "though it is tuned once"
    assert found["central"]["tokens"] == pytest.approx(found["lora"]["tokens"])
    unlike = rung(kind="federated", alpha=0.5, parties=2, **settings)
    assert unlike != found["federated"]
    with pytest.raises(InputError, match="kind='middle' is no rung"):
        rung(kind="middle", **settings)


def test_a_prefix_of_peft_begins_as_a_text_does(settings):
    module = measure.PeftTuning("random:tiny", "text-prefix", 2, candidates=["negative", "positive"], weights="float32", seed=5)
    module.configure_model()
    before = torch.randint(0, int(module.model.config.vocab_size), (1, 2), generator=torch.Generator().manual_seed(5))
    ids = torch.randint(3, 200, (1, 9))
    with torch.no_grad():
        behind = module.hidden_states({"input_ids": ids})
        whole = module.model.base_model(input_ids=torch.cat([before, ids], dim=1)).last_hidden_state[:, 2:]
    torch.testing.assert_close(behind, whole)


def test_adapters_of_peft_are_trained_and_the_weights_are_not(settings):
    for kind in ("lora", "prefix", "text-prefix"):
        module = measure.PeftTuning("random:tiny", kind, 2, candidates=["negative", "positive"], weights="float32")
        module.configure_model()
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name or name.startswith("encoder") for name in trained), trained
        ids = torch.randint(3, 200, (2, 9))
        module.hidden_states({"input_ids": ids}).sum().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_the_attack_reads_states_and_noise_hides_them(tmp_path):
    (tmp_path / "a.txt").write_text(prose(3000))
    (tmp_path / "b.txt").write_text(prose(600, seed=1))
    common = {"seed": 0, "source": "random:tiny", "cut": 1, "public": str(tmp_path / "a.txt"), "private": str(tmp_path / "b.txt")}
    clear, hidden = (
        inversion(noise=noise, public_tokens=12800, private_tokens=1280, **common)["recovered"] for noise in (0.0, 30.0)
    )
    del common["cut"]
    nothing = guess(public_tokens=12800, private_tokens=1280, **common)["recovered"]
    assert hidden < 0.5 < clear
    assert 0 < nothing < clear
