"""The source ``random:tiny``: a random model of 45 thousand parameters and a byte tokenizer, both built in code.

It exists so that every config, test and installation can be tried in seconds, without a download.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token a byte (ids 3 to 258) behind the three special tokens pad, start and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_SPECIAL[0], bos_token=_SPECIAL[1], eos_token=_SPECIAL[2]
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_model(seed: int = 0) -> PreTrainedModel:
    """Return a Llama model with random weights: 4 layers, hidden size 32, 4 query and 2 key/value heads, tied embeddings.

    Args:
        seed: Seed of the weights. The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # which the seed below is for, too
    with torch.device("cpu"), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
