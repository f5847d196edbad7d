"""What tokens of a tokenizer stand for, and what tells tokenizers apart."""

import hashlib
import json
import re
from functools import cache

import torch
from transformers import PreTrainedTokenizerBase

from .pretrained import SourceError

_DAY = "26 Jul 2024"


def needs_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer itself puts a BOS token before a text, as Gemma needs it at the start of every block."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool) -> str:
    """Return a conversation in the model's chat template, the same on each day for templates that take a date, as Llama 3's do.

    Args:
        tokenizer: Of the model.
        messages: ``role`` and ``content`` of each.
        prompt: Let the assistant's next turn begin.
    """
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, date_string=_DAY))


@cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes of UTF-8 text that each token stands for [vocabulary]; None for special tokens.

    Args:
        tokenizer: Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), or SentencePiece-like (Llama 2, Mistral, Gemma).

    Raises:
        SourceError: If it is of another kind, whose tokens do not spell their text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = str(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    pieces = "▁" in decoder or "Metaspace" in decoder
    if not pieces and "ByteLevel" not in decoder:
        raise SourceError(
            f"{type(tokenizer).__name__} is neither a byte-level tokenizer nor one of SentencePiece's kind, so its tokens do not "
            "spell the text that they stand for. Use a model with such a tokenizer."
        )
    special, added, table = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder, _byte_of_character()
    spelled: list[bytes | None] = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token is None or number in special or (number in added and added[number].special):
            spelled.append(None)
        elif number in added:
            spelled.append(token.encode())
        elif not pieces:
            spelled.append(bytes(table[character] for character in token))
        else:
            single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)  # SentencePiece writes a space as ▁
            spelled.append(bytes([int(single[1], 16)]) if single else token.replace("▁", " ").encode())
    return spelled


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return how many bytes of UTF-8 text each token stands for, int64 [vocabulary]; special tokens stand for none."""
    return torch.tensor([len(part or b"") for part in token_bytes(tokenizer)])


_PROBE = "Sand, struck by lightning: 3.14 × 10⁻² über\n\tdef f(x):\n        return x ** 2  # 雷 🌩"


@cache
def _tokenizer_digest(key: tuple) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 32 hexadecimal digits that are equal for tokenizers that give every text the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _tokenizer_digest((tuple(vocabulary), tuple(tokenizer(_PROBE).input_ids)))
