"""The calibration set in other systems, by the command line alone."""

import json

import pytest
import torch

from fulgurite.experiments.cli import run
from fulgurite.modules.pretrained import load_model
from tests.conftest import prose

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.mark.parametrize(
    "system",
    [
        ["--model=LanguageModel"],
        ["--model=SoftLabelDistillation", "--model.teacher=random:tiny", "--model.soft_weight=0.0"],
    ],
    ids=["LanguageModel", "SoftLabelDistillation"],
)
def test_other_systems_train_on_the_answers_alone(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": prose(60, n)}) + "\n" for n in range(20)))
    data = ["--data=SelfGeneratedCalibration", "--data.documents=texts.jsonl", "--data.lengths=[250]", "--data.kinds=[summary]"]
    data += ["--data.examples=1", "--data.val_examples=1", "--data.answer_tokens=6", "--data.answer_weights=float32"]
    words = ["fit", "-c", "language_model/finetune", *system, "--model.source=random:tiny", *data, *QUIET]
    cli = run([*words, "--trainer.max_steps=1", "--trainer.precision=32-true", "--trainer.callbacks=null"])
    (item,) = cli.datamodule.train_set.items
    ids = torch.tensor([item.ids])
    with torch.no_grad():
        logits = load_model("random:tiny")(ids).logits[0, item.answer_start - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, item.answer_start :])
    # The first step's loss is that of the untrained model on the answer's tokens.
    assert float(cli.trainer.callback_metrics["train_loss"]) == pytest.approx(float(wanted), abs=1e-4)
    assert len(item.answer) == 6
