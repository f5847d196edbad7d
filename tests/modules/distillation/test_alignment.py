"""Vocabularies and positions of two tokenizers: what is matched stands behind the same text, whatever the text is."""

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from fulgurite.modules.distillation.alignment import SpelledText, Spelling, VocabularyAlignment, shared_boundaries, tokenize
from fulgurite.modules.pretrained import SourceError
from fulgurite.modules.tokens import token_bytes
from tests.vocabularies import CORPUS, TEXT, TOKENIZERS

SPELLED = {name: token_bytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def test_tokens_spell_their_text():
    for name in ("bytes", "small", "large", "pieces"):
        ids = TOKENIZERS[name]("the sand 雷\n ü", add_special_tokens=False).input_ids
        assert b"".join(SPELLED[name][number] for number in ids).decode() == "the sand 雷\n ü", name
    assert SPELLED["pieces"][1] is None
    assert SPELLED["small"][0] is None


def test_a_tokenizer_whose_tokens_spell_nothing_is_refused():
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    with pytest.raises(SourceError, match="neither a byte-level tokenizer nor one of SentencePiece's kind"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"))


@pytest.mark.parametrize("teacher", ["large", "pieces"])
@pytest.mark.parametrize("student", ["bytes", "small", "large", "pieces", "prefix"])
def test_tokens_take_the_id_of_the_same_bytes_or_of_their_first_piece(teacher, student):
    aligned = VocabularyAlignment.of(Spelling.of(TOKENIZERS[teacher]), TOKENIZERS[student], 500)
    own = SPELLED[student]
    assert aligned.ids.shape == (500,)
    for number, part in enumerate(SPELLED[teacher]):
        ours = aligned.ids[number]
        ends = TOKENIZERS[teacher].eos_token_id == number and TOKENIZERS[student].eos_token_id is not None
        if not part:
            assert ours == (TOKENIZERS[student].eos_token_id if ends else -1)
        elif aligned.exact[number]:
            assert own[ours] == part
        else:
            assert part not in own
            assert part.startswith(own[ours])
    assert (aligned.ids[len(SPELLED[teacher]) :] == -1).all()
    if teacher == student:
        spelled = np.array([bool(part) for part in SPELLED[teacher]])
        assert aligned.exact[: len(spelled)][spelled].all()


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="雷")
@pytest.mark.parametrize(
    ("teacher", "student"), [("large", "pieces"), ("pieces", "small"), ("small", "prefix"), ("prefix", "bytes")]
)
def test_matched_positions_stand_behind_the_same_text(teacher, student, text):
    ids = TOKENIZERS[teacher](text, add_special_tokens=False).input_ids
    said = SpelledText.of(ids, SPELLED[teacher])
    own, ends = tokenize(said.text, TOKENIZERS[student], SPELLED[student])
    assert len(ends) == len(own)
    mine, yours = shared_boundaries(said.ends, ends)
    assert (mine[0], yours[0]) == (0, 0) or not ids
    assert (np.diff(mine) > 0).all()
    assert (np.diff(yours) > 0).all()
    for before, behind in zip(mine, yours):
        prefix = b"".join(SPELLED[teacher][number] for number in ids[:before])
        same = b"".join(SPELLED[student][number] for number in own[:behind])
        assert same.removeprefix(b" " if student == "prefix" and not prefix.startswith(b" ") else b"") in (prefix, b" " + prefix)
    # The whole text ends with both.
    if ids and own:
        assert (mine[-1], yours[-1]) == (len(ids), len(own))


@settings(max_examples=60, deadline=None)
@given(odd=st.sampled_from(["ﬁ", "①", "½", "\u00a0", "Å", "ｱ", "e\u0301"]), rest=st.sampled_from(CORPUS[:2]))
def test_a_character_that_a_tokenizer_changes_shifts_nothing_behind_it(odd, rest):
    def shared(text):
        ids = TOKENIZERS["bytes"](text, add_special_tokens=False).input_ids
        said = SpelledText.of(ids, SPELLED["bytes"])
        own, ends = tokenize(said.text, TOKENIZERS["changing"], SPELLED["changing"])
        mine, yours = shared_boundaries(said.ends, ends)
        return {(len(ids) - before, len(own) - behind) for before, behind in zip(mine, yours)}  # counted from the end

    plain = shared("x " + rest)
    behind = {pair for pair in plain if pair[0] < len(rest.encode())}
    assert len(behind) > 5
    assert len(behind & shared(odd + " " + rest)) >= len(behind) - 6, "a changed character further on costs its neighbours alone"


def test_half_a_character_is_no_boundary():
    ids = TOKENIZERS["bytes"]("雷a", add_special_tokens=False).input_ids
    said = SpelledText.of(ids, SPELLED["bytes"])
    assert said.text == "雷a"
    assert said.ends.tolist() == [-1, -1, 1, 2]
    cut = SpelledText.of(ids[1:], SPELLED["bytes"])
    assert cut.text == "\ufffd\ufffda"
    assert cut.ends.tolist() == [1, 2, 3]
