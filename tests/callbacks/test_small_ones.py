import json
from types import SimpleNamespace

import torch
from lightning.pytorch import Trainer

from fulgurite.callbacks import TextWriter, TokenRate
from fulgurite.datamodules import TextDataModule
from fulgurite.modules import LanguageModel
from fulgurite.modules.language_model import GenerationSettings


def trainer(folder, *callbacks, **settings):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder, callbacks=list(callbacks), **settings
    )


def test_text_writer_keeps_every_prompt(tmp_path, text_file):
    model = LanguageModel("random:tiny", generation=GenerationSettings(max_new_tokens=3, prompt_tokens=8))
    data = TextDataModule(str(text_file), block_size=64, batch_size=4, predict_split="val", val_fraction=0.1)
    trainer(tmp_path, TextWriter()).predict(model, data, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "text-0.jsonl").read_text().splitlines()]
    assert len(rows) == len(data.val_set)
    assert all(len(row["prompt"]) == 8 for row in rows)


def test_ranks_write_files_of_their_own(tmp_path):
    for rank in range(2):
        run = SimpleNamespace(default_root_dir=tmp_path, global_rank=rank, world_size=2)
        TextWriter(str(tmp_path / "said.jsonl")).write_on_batch_end(run, None, [{"prompt": str(rank)}], None, None, 0, 0)
    for rank in range(2):
        assert json.loads((tmp_path / f"said-{rank}.jsonl").read_text()) == {"prompt": str(rank)}


def test_batches_that_a_capture_had_stored_are_not_counted():
    rate = TokenRate()
    for outputs in (None, object()):
        rate.on_predict_batch_start(None, None, None, 0)
        rate.on_predict_batch_end(None, None, outputs, {"input_ids": torch.zeros(2, 8)}, 0)
    assert (rate.tokens, rate.sequences) == (16, 2)


def test_token_rate_counts_training_tokens(tmp_path, text_file):
    rate = TokenRate()
    model = LanguageModel("random:tiny", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run = trainer(tmp_path, rate, max_steps=6)
    run.fit(model, TextDataModule(str(text_file), block_size=64, batch_size=2))
    assert rate.tokens == 6 * 2 * 64
    assert rate.seconds > 0
    assert "tokens_per_second" in run.callback_metrics
