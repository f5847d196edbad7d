"""Tasks that plain text sets by itself: next words, masked words, and how its sentences belong together.

Of a text two parts are made: one for generation, as it stands, and one for understanding, in which up to three segments may be
out of order or from elsewhere and words are masked. All branches for understanding read the second one's features.
"""

import hashlib
import itertools
import logging
import re
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import nearest
from ...modules.multitask.objectives import IGNORED, Kind, Objective
from ...modules.tokens import needs_bos
from ..documents import DataError, check_documents, read_documents
from .tasks import SPLITS, Part, Task

Aim = Literal["next_words", "masked_words", "distance", "order"]

log = logging.getLogger(__name__)

DISTANCES = ("adjacent", "same document", "different document")
ORDERS = [order for count in (1, 2, 3) for order in itertools.permutations(range(count))]  # ERNIE 2.0, arXiv 1907.12412
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
# What an example is, by whether distance and order are asked: so many segments that follow one another, or two that do not.
_KINDS: dict[tuple[bool, bool], list[int | str]] = {
    (True, True): [2, "same", "other", 1, 3],
    (True, False): [2, "same", "other"],
    (False, True): [1, 2, 3],
    (False, False): [2],
}
_SPANS = (0.6, 0.3, 0.1)  # of one, two and three words


class TextTask(Task):
    """Tasks made on the fly from documents; each aim is a branch, named ``<task>/<aim>``.

    Args:
        train: Documents; see ``TextDataModule``.
        val: Documents to validate on; None holds out some of ``train``.
        aims: ``next_words``: language modelling. ``masked_words``: whole words and spans of them, of which 80 % are masked, 10 %
            are other words and 10 % stay (BERT). ``distance``: whether two segments are adjacent, from the same document or from
            different ones. ``order``: in which of its permutations up to three segments of a document stand (both ERNIE 2.0's).
        masked: Share of the words that are to be found, in (0, 1).
        train_tokens: Tokens of the documents that are read at most; None takes all.
        val_rows: Texts to validate on.
        val_fraction: Share of the documents that is held out when ``val`` is None, in (0, 1).
        length: Tokens of a text at most; longer ones are cut.
        text_field: Column that holds the text in JSONL, Parquet and hub data.

    Raises:
        InputError: If a file is missing, an aim unknown, a number out of range, or there are too few sentences.
    """

    def __init__(
        self,
        train: str = "package:python-docs",
        *,
        val: str | None = None,
        aims: list[Aim] | None = None,
        masked: float = 0.15,
        train_tokens: int | None = 1_000_000,
        val_rows: int = 200,
        val_fraction: float = 0.05,
        length: int = 128,
        text_field: str = "text",
    ) -> None:
        super().__init__(length)
        check_documents(train, "train")
        if val is not None:
            check_documents(val, "val")
        known = ["next_words", "masked_words", "distance", "order"]
        self.aims = list(aims) if aims is not None else known
        for aim in self.aims:
            if aim not in known:
                raise DataError(f"aims: {aim!r} is unknown. Legal: {', '.join(known)}.{nearest(aim, known)}")
        if not self.aims or len(set(self.aims)) < len(self.aims):
            raise DataError(f"aims={self.aims}: give one or more, each once. Legal: {', '.join(known)}.")
        if not 0 < masked < 1:
            raise DataError(f"masked={masked} is no share of the words. Legal: above 0, below 1.")
        if not 0 < val_fraction < 1:
            raise DataError(f"val_fraction={val_fraction} is no share of the documents. Legal: above 0, below 1.")
        if val_rows < 1 or (train_tokens is not None and train_tokens < 1):
            raise DataError(f"val_rows={val_rows}, train_tokens={train_tokens}: legal are 1 or more.")
        self.train, self.val, self.val_fraction, self.text_field = train, val, val_fraction, text_field
        self.masked, self.train_tokens, self.val_rows = masked, train_tokens, val_rows
        self.documents: dict[str, list[list[list[int]]]] = {}  # by split: documents of segments of token ids
        self.places: dict[str, list[tuple[int, int]]] = {}  # by split: where an example begins

    def open(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """See ``Task``."""
        self.name, self.seed = name, seed
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        begin = first if first is not None else tokenizer.bos_token_id if needs_bos(tokenizer) else None
        self.first = [begin] if begin is not None else []
        spare = next(one for one in (last, tokenizer.eos_token_id, tokenizer.pad_token_id, 0) if one is not None)
        self.between = spare
        self.last = [last] if last is not None else []
        self.mask = next(one for one in (tokenizer.mask_token_id, tokenizer.unk_token_id, spare) if one is not None)
        self.begins = _begins_word(tokenizer)
        special = set(tokenizer.all_special_ids)
        self.words = np.array([token for token in range(len(tokenizer)) if token not in special])
        train = self._read(self.train, tokenizer, "train")
        if self.val is not None:
            val = self._read(self.val, tokenizer, "val")
        else:
            if len(train) < 2:
                raise DataError(f"Task {name!r}: train={self.train!r} is one document, so none can be held out. Give val.")
            held_out = min(max(1, round(len(train) * self.val_fraction)), len(train) - 1)
            val, train = train[:held_out], train[held_out:]
        self._check(train)
        self.documents = {"train": train, "val": val, "test": val, "predict": val}
        for split in SPLITS:
            places = [
                (number, start) for number, document in enumerate(self.documents[split]) for start in range(0, len(document), 3)
            ]
            if split != "train":
                order = np.random.default_rng([seed, 1]).permutation(len(places))[: self.val_rows]
                places = [places[place] for place in order]
            self.places[split] = places

    def _check(self, documents: list[list[list[int]]]) -> None:
        """Refuse aims of which some classes could never occur."""
        longest = max(map(len, documents))
        for aim, possible in (("distance", longest > 2 and len(documents) > 1), ("order", longest > 2)):
            if aim in self.aims and not possible:
                raise DataError(
                    f"Task {self.name!r}: aims has {aim!r}, but train={self.train!r} has {len(documents)} documents, the longest "
                    f"of {longest} segments of up to {self._room} tokens; it needs two documents, and three segments in one. "
                    "Leave it out, give longer documents, or a smaller length."
                )

    @property
    def _room(self) -> int:
        """Tokens of a segment at most: three of them, with separators, make a text."""
        return max(1, self.length // 3 - 2)

    def _read(self, source: str, tokenizer: PreTrainedTokenizerBase, split: str) -> list[list[list[int]]]:
        """Return documents of segments of token ids, in the order of the documents' hashes, as far as ``train_tokens`` go."""
        texts = sorted(read_documents(source, self.text_field), key=lambda text: hashlib.sha256(text.encode()).digest())
        digest, found, tokens, left = hashlib.sha256(), [], 0, 0
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
            sentences = _sentences(text)
            if not sentences or (self.train_tokens is not None and tokens >= self.train_tokens):
                left += bool(sentences)
                continue
            ids = [one for one in tokenizer(sentences, add_special_tokens=False).input_ids if one]
            tokens += sum(map(len, ids))
            if ids:
                found.append(_segments(ids, self._room, self.begins))
        if not found:
            raise DataError(f"Task {self.name!r}: {split}={source!r} holds no text.")
        if left:
            what = f"{left} of {left + len(found)} documents of {split}={source!r}"
            log.info("Task %r leaves %s out, as train_tokens=%s", self.name, what, self.train_tokens)
        self.content[f"{self.name}/{split}"] = digest.hexdigest()[:32]
        return found

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        kinds = {
            "next_words": Objective("next_token"),
            "masked_words": Objective("masked_token"),
            "distance": Objective("sequence", DISTANCES),
            "order": Objective("sequence", tuple("".join(str(one + 1) for one in order) for order in ORDERS)),
        }
        return {f"{self.name}/{aim}": kinds[aim] for aim in self.aims}

    @property
    def kinds(self) -> list[Kind]:
        """See ``Task``."""
        return [objective.kind for objective in self.objectives.values()]

    def size(self, split: str) -> int:
        """See ``Task``."""
        return len(self.places[split])

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        random = np.random.default_rng([self.seed, SPLITS.index(split), index, draw])
        parts = []
        if "next_words" in self.aims:
            document, start = self.places[split][index]
            segments = self.documents[split][document][start:]
            ids = list(itertools.islice(itertools.chain(self.first, *segments), self.length))
            parts.append(Part("causal", ids, [0] * len(ids), {f"{self.name}/next_words": ids}))
        if len(self.aims) > len(parts):
            parts.append(self._understood(split, index, draw, random))
        return parts

    def _understood(self, split: str, index: int, draw: int, random: np.random.Generator) -> Part:
        segments, distance, order = self._segments(split, index, draw, random)
        room = (self.length - len(self.first) - len(segments)) // len(segments)
        ids, types = [*self.first], [0] * len(self.first)
        words: list[list[int]] = []  # where the tokens of each stand
        for number, segment in enumerate(segments):
            for token in segment[:room]:
                if not words or self.begins[token] or words[-1][-1] != len(ids) - 1:
                    words.append([])
                words[-1].append(len(ids))
                ids.append(token)
                types.append(min(number, 1))
            if number + 1 < len(segments) or self.last:
                ids.append(self.between)
                types.append(min(number, 1))
        targets: dict[str, object] = {}
        if "masked_words" in self.aims:
            ids, targets[f"{self.name}/masked_words"] = self._mask(ids, words, random)
        if "distance" in self.aims:
            targets[f"{self.name}/distance"] = distance
        if "order" in self.aims:
            targets[f"{self.name}/order"] = order
        return Part("bidirectional", ids, types, targets)

    def _segments(self, split: str, index: int, draw: int, random: np.random.Generator) -> tuple[list[list[int]], int, int]:
        """Return an example's segments, how far apart they are, and in which order they stand; -100 where that has no sense.

        Only two segments have a distance, or their number would tell it. Of a few examples that follow one another each is of
        another kind, so that a batch has targets of each aim.
        """
        documents = self.documents[split]
        number, start = self.places[split][index]
        document = documents[number]
        kinds = _KINDS["distance" in self.aims, "order" in self.aims]
        turn, place = divmod(draw, len(kinds))
        kind = kinds[np.random.default_rng([self.seed, len(SPLITS), turn]).permutation(len(kinds))[place]]
        here = document[start]
        if kind == "other" and len(documents) > 1:
            other = documents[(number + 1 + int(random.integers(len(documents) - 1))) % len(documents)]
            return [here, other[int(random.integers(len(other)))]], 2, IGNORED
        far = [place for place in range(len(document)) if abs(place - start) > 1]
        if kind == "same" and far:
            return [here, document[far[int(random.integers(len(far)))]]], 1, IGNORED
        count = min(kind if isinstance(kind, int) else 2, len(document) - start)
        order = tuple(random.permutation(count).tolist()) if "order" in self.aims else tuple(range(count))
        segments = [document[start + place] for place in order]
        return segments, 0 if count == 2 else IGNORED, ORDERS.index(order) if "order" in self.aims else IGNORED

    def _mask(self, ids: list[int], words: list[list[int]], random: np.random.Generator) -> tuple[list[int], list[int]]:
        ids, targets = list(ids), [IGNORED] * len(ids)
        wanted, chosen = max(1, round(self.masked * len(words))), set[int]()
        while len(chosen) < min(wanted, len(words)):
            first = int(random.integers(len(words)))
            span = 1 + int(random.choice(len(_SPANS), p=_SPANS))
            chosen |= set(range(first, min(first + span, len(words))))
        for word in sorted(chosen):
            how = random.random()  # the whole word alike
            for place in words[word]:
                targets[place] = ids[place]
                if how < 0.8:
                    ids[place] = self.mask
                elif how < 0.9:
                    ids[place] = int(random.choice(self.words))
        return ids, targets


def _sentences(text: str) -> list[str]:
    """Return a text's sentences, each with the blanks before it, so that together they are the text; the first gets one."""
    text = f" {text.strip()}"
    cuts = [0, *(match.start() for match in _SENTENCE.finditer(text) if match.start()), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _segments(sentences: list[list[int]], room: int, begins: list[bool]) -> list[list[int]]:
    """Return runs of consecutive sentences [segments], of up to so many tokens each; longer sentences are parted, at words."""
    found: list[list[int]] = [[]]
    for sentence in sentences:
        rest = sentence
        while rest:
            cut = len(rest)
            if cut > room:
                cut = next((place for place in range(room, 0, -1) if begins[rest[place]]), room)
            if found[-1] and len(found[-1]) + cut > room:
                found.append([])
            found[-1] += rest[:cut]
            rest = rest[cut:]
    return found


def _begins_word(tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Return for each token whether a word begins with it [vocabulary]."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    byte_level = any(token.startswith(("Ġ", "▁")) for token in tokens)
    if not byte_level and any(token.startswith("##") for token in tokens):  # WordPiece marks what goes on
        return [not token.startswith("##") for token in tokens]
    return [token.startswith(("Ġ", "▁", "Ċ")) for token in tokens]
