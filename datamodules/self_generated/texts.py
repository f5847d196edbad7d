"""Texts for prompts: documents cut and put together to a length, and questions."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from ...errors import nearest
from ..documents import DataError, read_rows


def pieces(documents: Iterable[str], size: int = 6000) -> Iterator[str]:
    """Yield documents, those of more than twice ``size`` characters cut at the ends of lines into pieces of about that size."""
    for document in documents:
        start = 0
        while len(document) - start > 2 * size:
            end = document.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
            yield document[start:end]
            start = end
        yield document[start:]


class Filler:
    """Text of a wanted number of tokens, taken from documents one after another; none is used twice.

    Args:
        documents: In the order of use.
        tokenizer: That counts the tokens.
        parameter: The parameter that named the documents, for the message.
    """

    def __init__(self, documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, parameter: str = "documents") -> None:
        self.documents, self.tokenizer, self.parameter = documents, tokenizer, parameter

    def take(self, tokens: int) -> str:
        """Return text of this many tokens.

        Raises:
            DataError: If the documents are used up.
        """
        pieces: list[str] = []
        missing = tokens
        while missing > 0:
            document = next(self.documents, None)
            if document is None:
                raise DataError(
                    f"{self.parameter}: the documents are too few for the prompts asked for. Give more text, fewer examples, or "
                    "shorter lengths."
                )
            coded = self.tokenizer(document.strip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = coded["offset_mapping"]
            pieces.append(document.strip()[: ends[missing - 1][1]] if len(ends) > missing else document.strip())
            missing -= len(ends) + 1  # the newline between
        return "\n".join(pieces)


def read_questions(source: str, question_field: str, answer_field: str, *, answers: bool) -> list[tuple[str, str | None]]:
    """Return questions, each once, with people's answers where there are some.

    Args:
        source: A .jsonl or .parquet file or ``hub:owner/name[/config][:split]``.
        question_field: Column of the question; of a list of turns the first is taken.
        answer_field: Column of the answer.
        answers: Whether every question needs one.

    Raises:
        DataError: If a row has no question, or lacks an answer that it needs.
    """
    found: dict[str, str | None] = {}
    for number, row in enumerate(read_rows(source), 1):
        asked, answer = row.get(question_field), row.get(answer_field)
        asked = asked[0] if isinstance(asked, list) and asked else asked
        for parameter, column, missing in (
            ("question_field", question_field, not isinstance(asked, str)),
            ("answer_field", answer_field, answers and not isinstance(answer, str)),
        ):
            if missing:
                raise DataError(f"{source}, row {number}: no text in {parameter}={column!r}.{nearest(column, map(str, row))}")
        found[str(asked)] = answer if isinstance(answer, str) else None
    return list(found.items())
