"""Running text for language modelling."""

from typing import Literal

from ..modules.tokens import needs_bos
from .base import TokenDataModule
from .documents import DataError, check_documents
from .packing import PackedBlocks, split_documents
from .token_cache import TokenCache, build_token_cache


class TextDataModule(TokenDataModule):
    """Documents packed into blocks of equal length, tokenised once into a cache.

    Documents are taken in the order of their hashes, and the training blocks drawn in an order that depends only on
    (seed, epoch, rank). ``predict`` reads one split in order.

    Args:
        train: Text to train on: a .txt, .md or .rst file (one document), a .jsonl or .parquet file (one a row), a folder
            of such files, ``hub:owner/name[/config][:split]``, or ``package:python-docs``.
        val: Text to validate on, of the same kinds; None holds out a part of the training text.
        val_fraction: Share of the training text's tokens that is held out when ``val`` is None, in [0, 1).
        block_size: Tokens in a block.
        batch_size: Blocks a batch on each device.
        train_tokens: Number of tokens to train on; the blocks beyond are left out. None takes all.
        val_tokens: Number of tokens to validate on; None takes all.
        bos: ``auto`` puts BOS before every piece of text where the tokenizer does so itself; ``always``; ``never``.
        append_eos: Put the end-of-text token behind every document.
        predict_split: Split that ``predict`` reads, for a capture of soft labels as an example.
        text_field: Column that holds the text in JSONL, Parquet and hub data.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the training order; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If a file is missing, a number out of range, or a text empty or shorter than one block.
    """

    def __init__(
        self,
        train: str = "package:python-docs",
        *,
        val: str | None = None,
        val_fraction: float = 0.05,
        block_size: int = 512,
        batch_size: int = 2,
        train_tokens: int | None = None,
        val_tokens: int | None = None,
        bos: Literal["auto", "always", "never"] = "auto",
        append_eos: bool = True,
        predict_split: Literal["train", "val"] = "train",
        text_field: str = "text",
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_documents(train, "train")
        if val is not None:
            check_documents(val, "val")
        if not 0 <= val_fraction < 1:
            raise DataError(f"val_fraction={val_fraction} is no share of the text. Legal: 0 up to, not including, 1.")
        if block_size < 2:
            raise DataError(f"block_size={block_size} predicts nothing. Legal: 2 or more.")
        for name, value in (("train_tokens", train_tokens), ("val_tokens", val_tokens)):
            if value is not None and value < block_size:
                raise DataError(f"{name}={value} is less than one block. Legal: block_size={block_size} or more, or null.")
        self.train_source, self.val_source, self.val_fraction = train, val, val_fraction
        self.block_size, self.train_tokens, self.val_tokens = block_size, train_tokens, val_tokens
        self.bos, self.append_eos, self.predict_split, self.text_field = bos, append_eos, predict_split, text_field
        self._caches: dict[str, TokenCache] = {}

    @property
    def longest_sequence(self) -> int:
        """See ``TokenDataModule``."""
        return self.block_size

    def prepare_data(self) -> None:
        """Tokenise the text into the cache."""
        for name, source in self._sources():
            build_token_cache(source, self.text_field, self.tokenizer, name)

    def _sources(self) -> list[tuple[str, str]]:
        sources = [("train", self.train_source)]
        return sources if self.val_source is None else [*sources, ("val", self.val_source)]

    def setup(self, stage: str | None = None) -> None:
        """Open the cache and pack the blocks."""
        if self.train_set is None:
            self._caches = {
                name: TokenCache(build_token_cache(source, self.text_field, self.tokenizer, name))
                for name, source in self._sources()
            }
            train = self._caches["train"]
            first, second = split_documents(train, 0.0 if self.val_source is not None else self.val_fraction)
            self.train_set = self._blocks(train, first, "train", self.train_tokens)
            if self.val_source is not None:
                val = self._caches["val"]
                self.val_set = self._blocks(val, split_documents(val, 0.0)[0], "val", self.val_tokens)
            elif self.val_fraction:
                self.val_set = self._blocks(train, second, "val_fraction", self.val_tokens)
        self.predict_set = self.train_set if self.predict_split == "train" else self.val_set
        if self.predict_set is None and stage == "predict":
            raise DataError("predict_split='val', but there is no validation text: give val, or val_fraction above 0.")

    def _blocks(self, cache: TokenCache, stretches: list, parameter: str, tokens: int | None) -> PackedBlocks:
        tokenizer = self.tokenizer
        bos = self.bos == "always" or (self.bos == "auto" and needs_bos(tokenizer))
        if bos and tokenizer.bos_token_id is None:
            raise DataError("bos='always', but the tokenizer has no BOS token. Legal here: auto, never.")
        blocks = PackedBlocks(
            cache,
            stretches,
            block_size=self.block_size,
            bos=tokenizer.bos_token_id if bos else None,
            eos=tokenizer.eos_token_id if self.append_eos else None,
            limit=None if tokens is None else tokens // self.block_size,
        )
        if len(blocks) == 0:
            hint = "raise val_fraction" if parameter == "val_fraction" else "give more text"
            raise DataError(
                f"{parameter}: the text has {blocks.tokens_available} tokens, shorter than one block of "
                f"block_size={self.block_size}. Lower block_size or {hint}."
            )
        return blocks

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the texts and the tokenizer's fingerprint."""
        return {**super().hashes(), **{name: cache.content for name, cache in self._caches.items()}}
