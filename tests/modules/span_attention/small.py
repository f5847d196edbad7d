"""Small random models of every supported architecture, and plans for them."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fulgurite.modules.span_attention import DENSE, SpanPlan, SpanRule

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
RULES = [SpanRule(5), SpanRule(1, 0.5), SpanRule(3, 0.25), SpanRule(9), DENSE, SpanRule(1), SpanRule(-20, 1.0, 6)]


def model_of(kind):
    torch.manual_seed(0)
    build, config, extra = KINDS[kind]
    return build(config(**{**SIZES, **extra})).eval()


def plan_for(model, rules=RULES, sink=2):
    full = SpanPlan.same(DENSE, model.config).rules
    numbers = iter(range(100))
    return SpanPlan(
        tuple(None if layer is None else tuple(rules[next(numbers) % len(rules)] for _ in layer) for layer in full), sink
    )


def ids_of(rows, length, seed=1):
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
