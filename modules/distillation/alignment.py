"""Two tokenizers over the same bytes: which tokens mean the same, and where both have a boundary.

A teacher's labels are ids of its own vocabulary. A student with another tokenizer learns from them in a third one: a teacher's
token that a token of the student spells takes that token's id, any other the id of the first piece that the student's tokenizer
makes of it. Positions are matched by what stands before them: where both tokenizations have a boundary, both predict what comes
next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import InputError
from ..tokens import needs_bos, token_bytes

_BATCH = 4096  # spellings that are tokenised at the same time


@dataclass(frozen=True)
class Spelling:
    """What a tokenizer's ids stand for.

    Args:
        tokens: Bytes that each token spells; None for special tokens [vocabulary].
        end: Id of the end-of-text token; None where there is none.
    """

    tokens: Sequence[bytes | None]
    end: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Spelling":
        """Return the spelling of a tokenizer.

        Raises:
            InputError: If its tokens do not spell their text.
        """
        return cls(token_bytes(tokenizer), tokenizer.eos_token_id)


@dataclass(frozen=True)
class VocabularyAlignment:
    """What id of the student's vocabulary each token of the teacher's takes.

    Args:
        ids: int32 [teacher's vocabulary]; -1 for special tokens, which no text spells, but for the end of a text.
        exact: Whether the student has a token of the same bytes, bool [teacher's vocabulary]; the others take their first piece.
    """

    ids: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, teacher: Spelling, student: PreTrainedTokenizerBase, vocabulary: int = 0) -> "VocabularyAlignment":
        """Align a teacher's vocabulary with that of a student's tokenizer.

        Args:
            teacher: What its tokens stand for.
            student: Byte-level or SentencePiece-like.
            vocabulary: Number of ids of the teacher's head, which may have more than its tokenizer; those mean nothing.

        Raises:
            InputError: If the student's tokens do not spell their text.
        """
        spelled, own, end = teacher.tokens, token_bytes(student), student.eos_token_id
        known: dict[bytes, int] = {}
        for number, part in enumerate(own):
            if part:
                known.setdefault(part, number)
        ids = np.full(max(vocabulary, len(spelled)), -1, dtype=np.int32)
        exact = np.zeros(len(ids), dtype=bool)
        others = []
        for number, part in enumerate(spelled):
            if part in known:
                ids[number], exact[number] = known[part], True
            elif part:
                others.append(number)
        for start in range(0, len(others), _BATCH):
            some = others[start : start + _BATCH]
            ids[some] = _first_pieces([spelled[number] or b"" for number in some], student, own, known)
        if teacher.end is not None and end is not None:
            ids[teacher.end], exact[teacher.end] = end, True
        return cls(ids, exact)


def _first_pieces(
    parts: Sequence[bytes], student: PreTrainedTokenizerBase, own: Sequence[bytes | None], known: dict[bytes, int]
) -> list[int]:
    """Return the first token that the student's tokenizer makes of some bytes.

    Where that is nothing that the bytes begin with (half a character; a space put in front), it is the longest token that they do
    begin with; -1 where there is none.
    """
    texts = [part.decode("utf-8", errors="replace") for part in parts]
    found = []
    for part, pieces in zip(parts, student(texts, add_special_tokens=False).input_ids):
        spelled = own[pieces[0]] if pieces else None
        if spelled and part.startswith(spelled):
            found.append(pieces[0])
            continue
        begins = (known[part[:size]] for size in range(len(part), 0, -1) if part[:size] in known)
        found.append(next(begins, -1))
    return found


@dataclass(frozen=True)
class SpelledText:
    """The text that tokens spell.

    Args:
        text: The text; a byte that belongs to no character (half a one at an end) is U+FFFD.
        ends: Character at which each token ends, rising, int64 [tokens]; -1 where it ends within a character. Special tokens end
            where the one before does.
    """

    text: str
    ends: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], spelled: Sequence[bytes | None]) -> "SpelledText":
        """Return the text of some tokens.

        Args:
            ids: The tokens.
            spelled: What each token of the vocabulary spells; see ``token_bytes``.
        """
        parts = [spelled[number] or b"" for number in ids]
        decoded = b"".join(parts).decode("utf-8", errors="surrogateescape")
        ends = _characters(decoded)[np.cumsum([len(part) for part in parts], dtype=np.int64)]
        return cls("".join("\ufffd" if "\udc80" <= character <= "\udcff" else character for character in decoded), ends)


def _characters(text: str) -> np.ndarray:
    """Return which character begins at each byte of a text, int64 [bytes + 1]; -1 within one."""
    encoded = np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)
    sizes = np.fromiter((len(character.encode("utf-8", errors="surrogateescape")) for character in text), np.int64, len(text))
    found = np.full(len(encoded) + 1, -1, dtype=np.int64)
    found[np.concatenate([[0], np.cumsum(sizes)])] = np.arange(len(text) + 1)
    return found


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, spelled: Sequence[bytes | None]) -> tuple[list[int], np.ndarray]:
    """Return a text's tokens, without special ones, and the character at which each ends, int64 [tokens]; -1 where nobody knows.

    The bytes that tokens spell say it, where these are the text's. A tokenizer that changes the text says itself where its tokens
    come from; what it does not say exactly is not taken.

    Args:
        text: The text.
        tokenizer: A fast one.
        spelled: What each of its tokens spells.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding.input_ids)
    spoken = SpelledText.of(ids, spelled)
    if spoken.text == text:
        return ids, spoken.ends
    if spoken.text == f" {text}":  # put in front by some
        return ids, np.where(spoken.ends > 0, spoken.ends - 1, spoken.ends)
    offsets = np.array(encoding.offset_mapping, dtype=np.int64).reshape(-1, 2)
    following = np.append(offsets[1:, 0], len(text))
    return ids, np.where(following == offsets[:, 1], offsets[:, 1], -1)


def shared_boundaries(teacher_ends: np.ndarray, student_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of the teacher's and of the student's tokens stand before each boundary that both have, int64 [boundaries].

    The text's beginning is the first of them. Behind several tokens that end at the same character stands the last of them.

    Args:
        teacher_ends: Character at which each of the teacher's tokens ends [tokens]; below 0 where it is no boundary.
        student_ends: The same of the student.
    """
    places = []
    for ends in (teacher_ends, student_ends):
        known = np.flatnonzero(ends >= 0)
        reverse = known[::-1]
        values, last = np.unique(ends[reverse], return_index=True)
        places.append((values, reverse[last] + 1))
    (ours, before), (theirs, behind) = places
    common, mine, yours = np.intersect1d(ours, theirs, return_indices=True)
    teacher, student = before[mine], behind[yours]
    if not len(common) or common[0] > 0:
        teacher, student = np.insert(teacher, 0, 0), np.insert(student, 0, 0)
    return teacher.astype(np.int64), student.astype(np.int64)


@dataclass(frozen=True)
class AlignedText:
    """A student's tokens of a text that a teacher has read, and where both have a boundary.

    Args:
        ids: The student's tokens.
        teacher: How many of the teacher's tokens stand before each boundary, rising, int64 [boundaries].
        student: How many of the student's, the same.
        within: The teacher's token in which each of the student's ends, int64 [ids].
    """

    ids: list[int]
    teacher: np.ndarray
    student: np.ndarray
    within: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], teacher: Spelling, tokenizer: PreTrainedTokenizerBase, student: Spelling) -> "AlignedText":
        """Write a text that a teacher has read in a student's tokens.

        Half a character at an end, as blocks of tokens have it, is left out. The end-of-text token stays one; a BOS token is put
        in front where the student's tokenizer does so itself.

        Args:
            ids: The teacher's tokens of a document or of a part of one.
            teacher: What they stand for.
            tokenizer: The student's.
            student: What its tokens stand for.

        Raises:
            InputError: If there are special tokens in the middle, as in a chat: no text of the student's says the same.
        """
        special = [place for place, number in enumerate(ids[1:-1], 1) if teacher.tokens[number] is None]
        if special:
            raise InputError(
                f"Token {ids[special[0]]} in the middle of a sequence is a special one of the teacher's, as chats have them: "
                "another tokenizer has no words for it. Capture plain text."
            )
        ended = len(ids) > 0 and ids[-1] == teacher.end
        said = SpelledText.of(ids[: len(ids) - ended], teacher.tokens)
        text = said.text.lstrip("\ufffd")
        left_out = len(said.text) - len(text)
        text = text.rstrip("\ufffd")
        own, own_ends = tokenize(text, tokenizer, student.tokens)
        if needs_bos(tokenizer):
            assert isinstance(tokenizer.bos_token_id, int)
            own, own_ends = [tokenizer.bos_token_id, *own], np.insert(own_ends, 0, 0)
        ends = np.where(said.ends < 0, -1, said.ends - left_out)
        before, behind = shared_boundaries(ends, own_ends)
        # Where nobody knows, a token ends before the next end that is known.
        known, own_known = (np.minimum.accumulate(np.where(part < 0, len(text), part)[::-1])[::-1] for part in (ends, own_ends))
        within = np.searchsorted(known, own_known, side="left").clip(max=max(len(known) - 1, 0))
        if ended and student.end is not None:
            own = [*own, student.end]
            before, behind = np.append(before, len(ids)), np.append(behind, len(own))
            within = np.append(within, len(ids) - 1)
        return cls(own, before, behind, within)
