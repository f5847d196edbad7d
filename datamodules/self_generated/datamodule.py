"""Calibration data whose supervision the model itself writes, and the alternatives that it is compared with."""

import logging
import math
import random
from collections import Counter
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import nearest
from ...files import digest
from ...modules.precision import FrozenDtype, frozen_dtype
from ...modules.pretrained import load_config, load_model, load_tokenizer, resolve_source
from ...modules.tokens import tokenizer_fingerprint
from ..base import TokenDataModule
from ..documents import DataError, check_documents, read_documents
from .answers import Answer, AnswerCache, AnswerSettings, perplexities
from .examples import CalibrationExample, CalibrationExamples, log_samples
from .prompts import KINDS, Kind, Prompt, PromptForm, question, retrieval, summary
from .texts import Filler, pieces, read_questions

log = logging.getLogger(__name__)

_OPENING = 48  # tokens of a document that a model goes on from
_WRITTEN = 512  # tokens of a written document at most; half of it at the least


class SelfGeneratedCalibration(TokenDataModule):
    """Prompts with the model's own answers, which alone carry loss.

    Long documents to summarise, keys hidden in them, and questions; the model answers itself, once, and the answers are
    kept in the cache under everything that they depend on. What a compressed model has to keep is what the model does, so this
    calibrates better than a text or people's answers do (MoA, arXiv 2406.14909), which are here too, to compare.

    Args:
        documents: Source of texts: a file, a folder, ``package:python-docs``, ``hub:owner/name[/config][:split]``; short ones
            are put together and very long ones cut at the ends of lines. None asks questions alone.
        text_field: Column of the text in JSONL, Parquet and hub data.
        documents_from: Model that writes the texts, each going on from the first words of a document; None takes the documents
            as people wrote them.
        questions: A .jsonl or .parquet file or ``hub:owner/name[/config][:split]`` with a question a row; None asks none.
        question_field: Column of the question; of a list, the first turn is asked.
        answer_field: Column of people's answer, for ``supervision: human``.
        kinds: What is asked: ``summary``, ``retrieval``, ``question``; None takes all that there is data for.
        lengths: Tokens of a prompt, its length levels.
        val_lengths: Those of the validation prompts; None takes the same.
        examples: Prompts of each kind at each length, to train on or to profile with.
        val_examples: The same of other documents, held out; 0 holds nothing out.
        supervision: What carries loss: ``own``, the model's answers; ``human``, people's answers (and the hidden keys), where the
            data has them; ``text``, all tokens of the documents themselves, without a question.
        answers_from: Model that answers; None is the one that is trained.
        answer_tokens: Tokens of an answer at most.
        temperature: 0 takes the likeliest token; above, answers are drawn.
        top_p: Answers are drawn from the smallest set with this probability mass, in (0, 1].
        cut_answers: What is done with an answer that ``answer_tokens`` cut off: ``keep`` or ``drop``.
        max_perplexity: Leave out answers of a higher perplexity under the model that answers; None takes all.
        chat: Ask through the tokenizer's chat template; None does where there is one, else in plain text.
        answer_batch_size: Prompts that are answered together.
        answer_weights: Type of the answering model's weights in memory.
        show: How many samples are logged before anything is done with them.
        batch_size: Sequences a batch on each device.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of prompts, drawn answers and training order; None takes that of the run (``seed_everything``), or 0.

    Raises:
        InputError: If a source or column is missing, a number out of range, the text too short, or every answer is empty.
    """

    def __init__(
        self,
        documents: str | None = "package:python-docs",
        *,
        text_field: str = "text",
        documents_from: str | None = None,
        questions: str | None = None,
        question_field: str = "question",
        answer_field: str = "answer",
        kinds: list[Kind] | None = None,
        lengths: list[int] = [512, 1024, 2048],  # noqa: B006  (never changed)
        val_lengths: list[int] | None = None,
        examples: int = 4,
        val_examples: int = 2,
        supervision: Literal["own", "human", "text"] = "own",
        answers_from: str | None = None,
        answer_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        cut_answers: Literal["keep", "drop"] = "keep",
        max_perplexity: float | None = None,
        chat: bool | None = None,
        answer_batch_size: int = 4,
        answer_weights: FrozenDtype = "auto",
        show: int = 2,
        batch_size: int = 1,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, num_workers=num_workers, seed=seed)
        if documents is not None:
            check_documents(documents, "documents")
        if questions is not None:
            check_documents(questions, "questions")
            if not questions.startswith("hub:") and Path(questions).suffix not in (".jsonl", ".parquet"):
                raise DataError(
                    f"questions={questions!r} has no rows. Legal: a .jsonl or .parquet file, hub:owner/name[/config][:split]."
                )
        for name, source in (("documents_from", documents_from), ("answers_from", answers_from)):
            if source is not None:
                resolve_source(source)
                if supervision != "own" and name == "answers_from" and max_perplexity is None:
                    log.warning("answers_from=%r is ignored: supervision is %r, so no model answers.", source, supervision)
        if supervision not in ("own", "human", "text"):
            raise DataError(f"supervision={supervision!r} is unknown.{nearest(supervision, ('own', 'human', 'text'))}")
        available = [kind for kind in KINDS if (questions if kind == "question" else documents) is not None]
        self.kinds: list[Kind] = available if kinds is None else list(kinds)
        for kind in self.kinds:
            if kind not in KINDS:
                raise DataError(f"kinds: {kind!r} is unknown.{nearest(kind, KINDS)}")
            if kind not in available:
                source = "questions" if kind == "question" else "documents"
                legal = ", ".join(available) or "none"
                raise DataError(f"kinds: {kind!r} needs {source}, which is missing. Legal here: {legal}.")
        if not self.kinds:
            raise DataError("documents and questions are both missing: there is nothing to ask. Give one of them.")
        if supervision == "text" and documents is None:
            raise DataError("supervision='text' needs documents, which are missing. Give documents, or another supervision.")
        if supervision == "human" and "summary" in self.kinds:
            if kinds is not None:
                raise DataError("kinds: no one has written a summary; supervision='human' has answers to: retrieval, question.")
            self.kinds.remove("summary")
        self.lengths, self.val_lengths = list(lengths), list(lengths if val_lengths is None else val_lengths)
        for name, levels in (("lengths", self.lengths), ("val_lengths", self.val_lengths)):
            if not levels or min(levels) < 1:
                raise DataError(f"{name}={levels} is no list of lengths. Legal: one or more numbers of tokens.")
        for name, number, least in (
            ("examples", examples, 1),
            ("val_examples", val_examples, 0),
            ("answer_batch_size", answer_batch_size, 1),
            ("answer_tokens", answer_tokens, 1),
            ("temperature", temperature, 0),
            ("show", show, 0),
        ):
            if number < least:
                raise DataError(f"{name}={number} is too small. Legal: {least} or more.")
        if not 0 < top_p <= 1:
            raise DataError(f"top_p={top_p} is no probability mass. Legal: above 0, up to 1.")
        if max_perplexity is not None and max_perplexity <= 1:
            raise DataError(f"max_perplexity={max_perplexity} would leave out every answer. Legal: above 1, or null for all.")
        if max_perplexity is not None and supervision == "text":
            raise DataError("max_perplexity is for answers, and supervision='text' has none. Leave it out.")
        self.documents, self.text_field, self.documents_from = documents, text_field, documents_from
        self.questions, self.question_field, self.answer_field = questions, question_field, answer_field
        self.examples, self.val_examples, self.supervision = examples, val_examples, supervision
        self.answers_from, self.cut_answers, self.max_perplexity = answers_from, cut_answers, max_perplexity
        self.answer_settings = AnswerSettings(
            answer_tokens, temperature=temperature, top_p=top_p, batch_size=answer_batch_size, seed=self.seed
        )
        self.chat, self.answer_weights, self.show = chat, frozen_dtype(answer_weights), show
        self._content = ""
        self._answered_by: str | None = None

    @property
    def answering_model(self) -> str | None:
        """Source of the model that answers; None where none is named and the data is used alone."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return self.answers_from or getattr(getattr(module, "source", None), "name", None)

    @property
    def _limit(self) -> tuple[int, str] | None:
        """The fewest positions of the models that read the examples, and of which; None where none is known."""
        module = None if self.trainer is None else self.trainer.lightning_module
        readers = [getattr(getattr(module, "source", None), "name", None)]
        if self.supervision == "own" or self.max_perplexity is not None:
            readers.append(self.answering_model)
        known = []
        for source in dict.fromkeys(reader for reader in readers if reader is not None):
            most = getattr(load_config(source).get_text_config(), "max_position_embeddings", None)
            known += [] if most is None else [(int(most), source)]
        return min(known, default=None)

    @property
    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def longest_sequence(self) -> int:
        """See ``TokenDataModule``."""
        answer = 0 if self.supervision == "text" else self.answer_settings.max_tokens
        return max(self.lengths) + answer

    def prepare_data(self) -> None:
        """Let the model answer; with several processes each writes its share, in ``setup``."""
        if self.train_set is None and self._world[1] == 1:
            self._make()

    def setup(self, stage: str | None = None) -> None:
        """Read the answers and make the examples of them."""
        if self.train_set is None:
            self._make()
        elif self._answered_by not in (None, self.answering_model):
            raise DataError(
                f"answers_from=None: this data holds the answers of {self._answered_by}, and the model is now "
                f"{self.answering_model}. Make the data anew, or name who answers."
            )

    def _make(self) -> None:
        source = self.answering_model
        self._check_lengths()
        form = PromptForm(self.tokenizer, self.chat)
        texts: list[list[str]] = [[], []]
        if self.documents is not None:
            documents = sorted(set(read_documents(self.documents, self.text_field)), key=digest)
            if not documents:
                raise DataError(f"documents={self.documents!r} holds no text. Give a source with documents.")
            if len(documents) == 1 and self.val_examples:
                log.warning("documents=%r is one document: its last part is held out.", self.documents)
                documents = list(pieces(documents))
            tokens = [count * sum(lengths) for lengths, count in self._levels]
            texts = [list(pieces(part)) for part in self._split(documents, tokens)]
        asked_all: list[tuple[str, str | None]] = []
        if self.questions is not None:
            human = self.supervision == "human"
            asked_all = read_questions(self.questions, self.question_field, self.answer_field, answers=human)
        questions = self._split(sorted(asked_all, key=digest), [count for _, count in self._levels])
        model: PreTrainedModel | None = None
        if self.supervision == "own" or self.max_perplexity is not None:
            if source is None:
                raise DataError(
                    "answers_from=None: name the model that answers, or use the data with one of the suite's systems."
                )
            if tokenizer_fingerprint(load_tokenizer(source)) != tokenizer_fingerprint(self.tokenizer):
                raise DataError(
                    f"answers_from={source!r} has another tokenizer than the model that is trained: its answers would be other "
                    "tokens. Name a model with the same tokenizer."
                )
            model = self._load(source)
            self._answered_by = source
        splits: list[list[CalibrationExample]] = []
        for number, (documents, asked, (lengths, count)) in enumerate(zip(texts, questions, self._levels)):
            if not count:
                splits.append([])
                continue
            if self.documents_from is not None:
                kinds = 1 if self.supervision == "text" else sum(kind != "question" for kind in self.kinds)
                documents = self._written(documents, count * kinds * sum(lengths), model) if kinds else documents
            generator = random.Random(f"{self.seed} {number}")
            generator.shuffle(documents)
            generator.shuffle(asked)
            filler = Filler(iter(documents), self.tokenizer)
            if self.supervision == "text":
                splits.append([self._text(filler, length) for length in lengths for _ in range(count)])
            else:
                splits.append(self._examples(form, self._prompts(form, filler, asked, lengths, count, generator), model))
        self._content = digest([[example.ids, example.answer_start] for split in splits for example in split])
        self.train_set = CalibrationExamples(splits[0])
        self.val_set = CalibrationExamples(splits[1]) if splits[1] else None
        self.predict_set = self.val_set or self.train_set
        if self._world[0] == 0:
            log_samples(splits[0], self.tokenizer, self.show)

    @property
    def _levels(self) -> list[tuple[list[int], int]]:
        """Lengths and examples of each, for training and for validation."""
        return [(self.lengths, self.examples), (self.val_lengths, self.val_examples)]

    @staticmethod
    def _split(items: list, wanted: list[int]) -> list[list]:
        """Divide items between training and validation in proportion to what they want."""
        held_out = 0
        if wanted[1] and len(items) > 1:
            held_out = min(max(round(len(items) * wanted[1] / sum(wanted)), 1), len(items) - 1)
        return [items[: len(items) - held_out], items[len(items) - held_out :]]

    def _load(self, source: str) -> PreTrainedModel:
        model = load_model(source, self.answer_weights)
        return model if self.trainer is None else model.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]

    def _cache(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: AnswerSettings
    ) -> dict[int, Answer]:
        """Return all answers of a model; what is missing is written, each process its share."""
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
        cache = AnswerCache(
            model, prompts, settings, sorted({end for end in ends if end is not None}), tokenizer.pad_token_id or 0
        )
        cache.write(*self._world)
        if self.trainer is not None and self._world[1] > 1:
            self.trainer.strategy.barrier()
        return cache.read()

    def _written(self, documents: list[str], tokens: int, model: PreTrainedModel | None) -> list[str]:
        assert self.documents_from is not None
        count = math.ceil(tokens / (_WRITTEN // 2))
        if len(documents) < count:
            raise DataError(
                f"documents={self.documents!r} has {len(documents)} documents to go on from; {count} are needed. Give more "
                "documents, fewer examples, or shorter lengths."
            )
        tokenizer = load_tokenizer(self.documents_from)
        openings = [ids[:_OPENING] for ids in tokenizer(documents[:count], verbose=False).input_ids]
        writer = model if model is not None and self.documents_from == self.answering_model else self._load(self.documents_from)
        settings = AnswerSettings(_WRITTEN, min_tokens=_WRITTEN // 2, temperature=0.8, top_p=0.95, seed=self.seed)
        written = self._cache(writer, tokenizer, openings, settings)
        whole = [[*opening, *written[index].ids] for index, opening in enumerate(openings)]
        return [str(text) for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]

    def _prompts(
        self, form: PromptForm, filler: Filler, asked: list, lengths: list[int], count: int, generator: random.Random
    ) -> list[Prompt]:
        prompts: list[Prompt] = []
        for kind in self.kinds:
            if kind == "question":
                if len(asked) < count:
                    raise DataError(
                        f"questions={self.questions!r} has {len(asked)} questions for {count} examples. Give more questions or "
                        "fewer examples."
                    )
                prompts += [question(form, text, answer) for text, answer in asked[:count]]
                continue
            for length in lengths:
                for number in range(count):
                    if kind == "summary":
                        prompts.append(summary(form, filler, length))
                        continue
                    # Keys at all depths, however few there are.
                    depth = (number + generator.random()) / count
                    prompts.append(retrieval(form, filler, length, generator, depth=depth))
        return prompts

    def _examples(self, form: PromptForm, prompts: list[Prompt], model: PreTrainedModel | None) -> list[CalibrationExample]:
        ids = [form.ids(prompt.text) for prompt in prompts]
        if self.supervision == "human":
            answers = [Answer(tuple(form.answer_ids(prompt.text, prompt.answer or "")), False) for prompt in prompts]
            self._check_longest([len(head) + len(answer.ids) for head, answer in zip(ids, answers)], "their answers")
        else:
            assert model is not None
            self._check_longest([len(head) + self.answer_settings.max_tokens for head in ids], "answer_tokens")
            found = self._cache(model, self.tokenizer, ids, self.answer_settings)
            missing = len(prompts) - len(found)
            if missing:
                raise DataError(
                    f"{missing} answers are missing: several machines need one cache folder for all. Set FULGURITE_CACHE to one."
                )
            answers = [found[index] for index in range(len(prompts))]
        special = set(self.tokenizer.all_special_ids)
        fates = Counter[str]()
        kept = []
        for prompt, head, answer in zip(prompts, ids, answers):
            fate = "empty" if not set(answer.ids) - special else "cut off" if answer.cut and self.cut_answers == "drop" else ""
            fates[fate] += 1
            if not fate:
                kept.append(CalibrationExample(prompt.kind, prompt.length, tuple(head) + answer.ids, len(head)))
        if self.max_perplexity is not None and kept:
            assert model is not None
            measured = perplexities(model, [(example.prompt, example.answer) for example in kept])
            fates["of a higher perplexity"] = sum(value > self.max_perplexity for value in measured)
            kept = [example for example, value in zip(kept, measured) if value <= self.max_perplexity]
        cut = sum(answer.cut for answer in answers)
        if cut and self.cut_answers == "keep":
            most = self.answer_settings.max_tokens
            log.warning("%d of %d answers are cut off at answer_tokens=%d, and kept.", cut, len(prompts), most)
        left_out = ", ".join(f"{number} {fate}" for fate, number in fates.items() if fate and number)
        if not kept:
            raise DataError(
                f"None of the {len(prompts)} answers can be used: {left_out}. Raise answer_tokens or max_perplexity, set "
                "cut_answers to keep, or let a model answer that is tuned for it (answers_from)."
            )
        if left_out:
            log.warning("Of %d answers %d are left out: %s.", len(prompts), len(prompts) - len(kept), left_out)
        return kept

    def _check_longest(self, sizes: list[int], what: str) -> None:
        if (limit := self._limit) is not None and max(sizes) > limit[0]:
            raise DataError(
                f"questions={self.questions!r} and {what} make a text of {max(sizes)} tokens; {limit[1]} takes {limit[0]}. Leave "
                "out long questions, or lower answer_tokens."
            )

    def _check_lengths(self) -> None:
        lengths = self.lengths + (self.val_lengths if self.val_examples else [])
        tokens = max(lengths) + (0 if self.supervision == "text" else self.answer_settings.max_tokens)
        limit = self._limit
        if self.documents is not None and limit is not None and tokens > limit[0]:
            raise DataError(
                f"lengths={self.lengths}, val_lengths={self.val_lengths} and answer_tokens make texts of {tokens} tokens; "
                f"{limit[1]} takes {limit[0]}. Lower them."
            )

    def _text(self, filler: Filler, length: int) -> CalibrationExample:
        ids = self.tokenizer(filler.take(length), verbose=False).input_ids[:length]
        return CalibrationExample("text", length, tuple(ids), 1)

    def hashes(self) -> dict[str, str]:
        """Return the hash of the examples and the tokenizer's fingerprint."""
        return {**super().hashes(), "calibration": self._content}
