"""Small tokenizers of the usual kinds, for tests of what two vocabularies share."""

import json

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fulgurite.modules.tiny import tiny_tokenizer

# Without the spelling of a special token, which a tokenizer takes for that token; Hypothesis finds it in the sources.
_PLAIN = st.text(max_size=60).filter(lambda text: "<|" not in text)
TEXT = _PLAIN | st.lists(st.sampled_from(["the sand", " was", " grün", "雷", "  ", "\n", "ﬁ", "é", "x"])).map("".join)
CORPUS = ["the sand was struck by lightning and the glass was green", "Der Sand wurde grün; 3.14 × 10⁻² 雷 the end."] * 20


def byte_level(size):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def pieces(size, *, normalizer=None, prefix=False):
    """A tokenizer like SentencePiece's: ▁ for a space, single bytes for what it has not seen."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    parts = [normalizers.NFKC()] if normalizer else []
    parts += [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=special[:2]))
    vocabulary, merges = _parts(made)
    for token in special[2:]:
        vocabulary.setdefault(token, len(vocabulary))
    made.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def _parts(made):
    model = json.loads(made.to_str())["model"]
    return dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]


TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "small": byte_level(300),
    "large": byte_level(420),
    "pieces": pieces(200),
    "prefix": pieces(200, prefix=True),
    "changing": pieces(200, normalizer=True, prefix=True),
}
