"""The whole way on the real model: fit, export, and keys found in long texts with a quarter of the cache."""

import random

import pytest
import torch

from fulgurite.datamodules.documents import read_documents
from fulgurite.datamodules.self_generated.prompts import PromptForm, retrieval
from fulgurite.datamodules.self_generated.texts import Filler
from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.modules.pretrained import load_tokenizer, resolve_source
from fulgurite.modules.spans import SpanCache, load, plan_of

SMOLLM = "package:smollm2-135m-instruct"
SEEDS = (15, 16, 17, 18, 19)  # of prompts whose keys the dense model finds


@pytest.mark.slow
def test_real_model_with_spans_finds_keys_in_long_texts(tmp_path, monkeypatch):
    try:
        resolve_source(SMOLLM)
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    small = ["--data.val_lengths=[1536]", "--data.examples=1", "--data.val_examples=1"]
    run(["fit", "-c", "spans/compress", "--run=pruned", *small, "--trainer.enable_progress_bar=false"])
    folder = "runs/spans/pruned/export"
    model, tokenizer = load(folder), load_tokenizer(folder)
    plan = plan_of(model.config)
    form = PromptForm(tokenizer)
    documents = list(read_documents("package:python-docs"))
    found = 0
    for seed in SEEDS:
        generator = random.Random(seed)
        filler = Filler(iter(generator.sample(documents, 60)), tokenizer)
        prompt = retrieval(form, filler, 4000, generator, depth=(seed % 10 + 0.5) / 10)
        ids = torch.tensor([form.ids(prompt.text)])
        cache = SpanCache(plan, model.config)
        mask = torch.ones_like(ids)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache)
        found += prompt.answer in tokenizer.decode(written[0, ids.shape[1] :])
        tokens = written.shape[1] - 1
        dense = 30 * 2 * 3 * 64 * 2 * tokens  # layers, keys and values, heads, size, bytes of bfloat16
        assert cache.nbytes() <= 0.25 * dense
        assert cache.nbytes() == pytest.approx(plan.density(tokens) * dense, rel=0.02)
    assert found >= 4
