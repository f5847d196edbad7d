"""A whole run: profile, plan, tune, validate, export, and what the exported folder does in plain ``transformers`` and in ours."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from fulgurite.callbacks import ExportPretrained
from fulgurite.datamodules import SelfGeneratedCalibration, TextDataModule
from fulgurite.errors import InputError
from fulgurite.modules import LanguageModel, SpanPruning
from fulgurite.modules.pretrained import load_model
from fulgurite.modules.spans import CandidateRules, SpanPlan, UniformWindow, plan_of
from fulgurite.modules.student import StudentSpec

CANDIDATES = CandidateRules(sink=4, window=8, alphas=[0, 32], betas=[0.0, 0.25])


def trainer(folder, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, "max_steps": 0, "num_sanity_val_steps": 0, **settings})


def calibration(documents_file, **settings):
    small = {"lengths": [250, 300], "val_lengths": [350], "examples": 1, "val_examples": 1, "answer_tokens": 6, "show": 0}
    return SelfGeneratedCalibration(str(documents_file), **{**small, **settings})


def pruning(**settings):
    return SpanPruning("random:tiny", **{"density": 0.3, "candidates": CANDIDATES, **settings})


def test_fit_exports_a_model_with_its_plan(tmp_path, long_documents):
    export = ExportPretrained(str(tmp_path / "export"), dtype="float32")
    module = pruning(check=1)
    trainer(tmp_path, callbacks=[export]).fit(module, calibration(long_documents))
    assert module.plan is not None
    notes = module.plan.notes
    assert all(density <= 0.3 for density in notes["density"].values())
    assert set(notes["validation"]) == {"loss", "dense_loss", "kl", "agreement", "right"}
    assert -1 <= notes["check"]["rank_correlation"] <= 1
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert SpanPlan.from_json(config["span_plan"]) == module.plan
    assert json.loads((tmp_path / "export/span_plan.json").read_text()) == config["span_plan"]
    assert (tmp_path / "export/spans.png").stat().st_size > 1000
    card = (tmp_path / "export/README.md").read_text().split("---\n")[2].strip()
    assert card.startswith("**Plain `transformers`, vLLM and llama.cpp run this model dense.")
    assert "share of the cache at 300 tokens: 0." in card
    loaded = load_model(str(tmp_path / "export"))
    assert plan_of(loaded.config) == module.plan
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, module.model.eval()(ids).logits)
        assert not torch.allclose(loaded(ids).logits, load_model("random:tiny")(ids).logits)
    with pytest.raises(InputError, match="has a plan of spans already"):
        SpanPruning(str(tmp_path / "export"))


DENSE_IN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.arange(3, 103)[None]).logits
print(type(model).__name__, model.config._attn_implementation, float(logits.detach().double().sum()))
"""


def said(program, folder):
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_plain_transformers_runs_the_folder_dense_and_ours_with_spans(tmp_path, long_documents):
    export = ExportPretrained(str(tmp_path / "export"), dtype="float32")
    trainer(tmp_path, callbacks=[export]).fit(pruning(planner=UniformWindow()), calibration(long_documents))
    ids = torch.arange(3, 103)[None]
    dense = float(load_model("random:tiny")(ids).logits.detach().double().sum())
    name, attention, total = said(DENSE_IN_TRANSFORMERS, tmp_path / "export")
    assert (name, attention) == ("LlamaForCausalLM", "sdpa")
    assert float(total) == pytest.approx(dense, abs=1e-2)
    name, attention, total = said("import fulgurite.modules.spans" + DENSE_IN_TRANSFORMERS, tmp_path / "export")
    assert (name, attention) == ("LlamaForCausalLM", "fulgurite_spans")
    assert abs(float(total) - dense) > 1


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_tuning_sees_the_spans_and_goes_on_from_a_checkpoint(tmp_path, long_documents, kl_weight):
    def run(steps, checkpoint=None):
        seed_everything(0)
        module = pruning(kl_weight=kl_weight, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
        fitter = trainer(tmp_path, max_steps=steps, callbacks=[keep])
        fitter.fit(module, calibration(long_documents), ckpt_path=checkpoint)
        return module, keep

    whole, _ = run(3)
    assert whole.plan is not None
    _, keep = run(2)
    resumed, _ = run(3, keep.best_model_path or str(sorted((tmp_path / "kept").glob("*step=2*.ckpt"))[-1]))
    assert resumed.plan == whole.plan
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    alone = SpanPruning.load_from_checkpoint(sorted((tmp_path / "kept").glob("*step=3*.ckpt"))[-1])
    assert alone.plan == whole.plan
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        assert torch.equal(alone.model.eval()(ids).logits, whole.model.eval()(ids).logits)


def test_other_systems_keep_the_plan_and_a_student_its_part_of_it(tmp_path, long_documents):
    export = ExportPretrained(str(tmp_path / "export"), dtype="float32")
    trainer(tmp_path, callbacks=[export]).fit(pruning(), calibration(long_documents))
    again = ExportPretrained(str(tmp_path / "again"), dtype="float32")
    module = LanguageModel(str(tmp_path / "export"), student=StudentSpec([0, 2, 3]))
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1)
    trainer(tmp_path, max_steps=1, callbacks=[again, keep]).fit(module, calibration(long_documents))
    whole = SpanPlan.from_json(json.loads((tmp_path / "export/span_plan.json").read_text()))
    part = load_model(str(tmp_path / "again"))
    assert plan_of(part.config).rules == tuple(whole.rules[layer] for layer in (0, 2, 3))
    ids = torch.arange(3, 103)[None]
    loaded = LanguageModel.load_from_checkpoint(keep.best_model_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(ids).logits, part(ids).logits)
    assert part.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 103)


def test_language_models_train_on_the_calibration_set_too(tmp_path, long_documents):
    data = calibration(long_documents)
    module = LanguageModel("random:tiny")
    fitter = trainer(tmp_path, max_steps=2)
    fitter.fit(module, data)
    assert float(fitter.callback_metrics["train_loss"]) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density=0.0 is no share of the cache"),
        ({"density": 2}, "density=2 is no share of the cache"),
        ({"kl_weight": 1.5}, "kl_weight=1.5 is no share of the loss"),
        ({"check": -1}, "check=-1 is below 0"),
        ({"rules_per_layer": 0}, "rules_per_layer=0 leaves a layer without a rule"),
        ({"budget_lengths": [1000]}, r"budget_lengths=\[1000\]: source='random:tiny' takes texts of 512 tokens at most"),
        ({"budget_lengths": [32]}, "leaves 10 of 32 tokens, and the shortest rule with a sink of 4 keeps 12"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        pruning(**settings)


def test_what_cannot_be_profiled_is_refused(tmp_path, long_documents, documents_file):
    with pytest.raises(InputError, match="no prompt with one answer behind it"):  # blocks of several documents
        trainer(tmp_path).fit(pruning(), TextDataModule(str(documents_file), block_size=256, batch_size=2))
    # Before the model answers anything.
    with pytest.raises(InputError, match="SpanPruning needs a data module"):
        trainer(tmp_path).fit(pruning(), [])
    with pytest.raises(InputError, match="leaves 12 of 40 tokens, and the shortest rule"):
        trainer(tmp_path).fit(pruning(candidates=CandidateRules(sink=16)), calibration(long_documents, lengths=[40]))


def test_a_model_whose_attention_cannot_be_hooked_is_refused(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from fulgurite.modules.tiny import tiny_tokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = GPTNeoXConfig(vocab_size=259, max_position_embeddings=64, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    module = SpanPruning(str(tmp_path))
    with pytest.raises(InputError, match=r"has an attention that cannot be given spans. Legal: models of the kinds Llama, Qwen2"):
        module.configure_model()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fork has no CUDA")
def test_two_processes_share_the_work_and_make_the_same_plan(tmp_path, long_documents, monkeypatch):
    def exported(name, **settings):
        monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / name / "cache"))
        seed_everything(0)
        data = calibration(long_documents, answer_weights="float32", answer_batch_size=1)
        trainer(tmp_path / name, callbacks=[ExportPretrained(str(tmp_path / name / "export"))], **settings).fit(pruning(), data)
        return json.loads((tmp_path / name / "export/span_plan.json").read_text())

    two = DDPStrategy(start_method="fork", process_group_backend="gloo")
    shared = exported("shared", strategy=two, devices=2)
    files = sorted(path.name.split("-")[0] for path in (tmp_path / "shared/cache/answers").glob("*/*.jsonl"))
    assert set(files) == {"0", "1"}, "each process wrote answers"
    alone = exported("alone")
    assert shared["rules"] == alone["rules"]
    assert shared["notes"]["validation"] == pytest.approx(alone["notes"]["validation"], abs=1e-4)
