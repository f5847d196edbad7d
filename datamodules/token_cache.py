"""Documents, tokenised once and kept in memory-mapped files."""

import hashlib
import itertools
import logging
from pathlib import Path

import numpy as np
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from ..files import atomic_folder, cache_folder, write_json
from ..modules.tokens import tokenizer_fingerprint
from .documents import DataError, documents_hash, read_documents

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 512


class TokenCache:
    """The tokens of all documents of a source, without special tokens.

    Args:
        folder: Folder made by :func:`build_token_cache`.

    Attributes:
        tokens: All token ids, document after document [tokens], uint32, memory-mapped.
        offsets: Where each document begins, and the end [documents + 1], int64.
        order: The documents sorted by the hash of their text [documents], int64: an order that is as good as random and
            does not change when documents are added elsewhere.
        content: Hash of the documents.
    """

    def __init__(self, folder: Path) -> None:
        self.tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.order = np.load(folder / "order.npy", mmap_mode="r")
        self.content = (folder / "content").read_text()

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of one document [tokens], uint32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def build_token_cache(source: str, text_field: str, tokenizer: PreTrainedTokenizerBase, parameter: str) -> Path:
    """Tokenise the documents of a source, unless the cache has them already.

    Args:
        source: See ``check_documents``.
        text_field: Column that holds the text.
        tokenizer: The tokenizer.
        parameter: Name of the parameter that holds the source, for messages.

    Returns:
        The cache's folder, named by the hashes of the documents and of the tokenizer.

    Raises:
        DataError: If there is no text in the source.
    """
    content = documents_hash(source, text_field)
    folder = cache_folder("tokens", f"{content[:20]}-{tokenizer_fingerprint(tokenizer)[:12]}")
    if folder.is_dir():
        return folder
    lengths: list[int] = []
    hashes: list[bytes] = []
    with atomic_folder(folder) as new, open(new / "tokens.bin", "wb") as file, Progress() as progress:
        task = progress.add_task(f"Tokenising {Path(source).name} (once)", total=None)
        documents = read_documents(source, text_field)
        while texts := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
            for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False).input_ids):
                lengths.append(len(ids))
                hashes.append(hashlib.sha256(text.encode()).digest()[:16])
                file.write(np.asarray(ids, dtype="<u4").tobytes())
            progress.update(task, advance=len(texts), description=f"Tokenising (once): {sum(lengths):,} tokens")
        if not sum(lengths):
            raise DataError(f"{parameter}={source!r} holds no text: every document is empty. Give a text with content.")
        np.save(new / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(new / "order.npy", np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64))
        (new / "content").write_text(content)
        write_json(new / "about.json", {"source": source, "documents": len(lengths), "tokens": sum(lengths)})
    return folder
