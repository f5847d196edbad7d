"""Prompts for calibration and for long-context tests: documents to summarise, questions, and keys hidden in a text."""

import random
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ...modules.tokens import render_chat
from ..documents import DataError
from .texts import Filler

Kind = Literal["summary", "question", "retrieval"]
KINDS: tuple[Kind, ...] = ("summary", "question", "retrieval")

_NAMES = ("Amsterdam", "Bogota", "Cairo", "Denver", "Edinburgh", "Fukuoka", "Geneva", "Hanoi")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        kind: What it has to do.
        text: Rendered, up to where the answer begins.
        length: The length level that it was built for, in tokens; 0 for a question, which has its own.
        answer: What people answer, or the key that was hidden; None where nobody knows.
    """

    kind: Kind
    text: str
    length: int
    answer: str | None = None


class PromptForm:
    """How a request is put to a model: through its chat template, or as plain text for a base model.

    Args:
        tokenizer: Of the model.
        chat: Use the chat template; None does where there is one.

    Raises:
        DataError: If a chat is asked for and the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> None:
        if chat and not tokenizer.chat_template:
            raise DataError("chat=True, but the tokenizer has no chat template. Leave chat out, or use a model tuned for chats.")
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template) if chat is None else chat

    def render(self, request: str, plain_cue: str, start: str = "") -> str:
        """Return the prompt of a request.

        Args:
            request: What the user says.
            plain_cue: What leads to the answer in plain text, where no assistant's turn does.
            start: The answer's first words, given to the model.
        """
        if not self.chat:
            return f"{request}\n{plain_cue}{f' {start}' if start else ''}".rstrip(" ")
        messages = [{"role": "user", "content": request}]
        return render_chat(self.tokenizer, messages, prompt=True) + start

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered prompt; a template writes its own first token."""
        return list(self.tokenizer(text, add_special_tokens=not self.chat, verbose=False).input_ids)

    def answer_ids(self, text: str, answer: str, *, end: bool = True) -> list[int]:
        """Return the tokens of an answer behind a prompt.

        Args:
            text: The prompt.
            answer: What people wrote.
            end: With the end of the turn.
        """
        apart = answer if text[-1:].isspace() or self.chat else f" {answer}"
        stop = self.tokenizer.eos_token_id
        return [*self.tokenizer(apart, add_special_tokens=False).input_ids, *([stop] if end and stop is not None else [])]


def summary(form: PromptForm, filler: Filler, length: int) -> Prompt:
    """Ask for a summary of a text, in a prompt of at most ``length`` tokens."""

    def render(text: str) -> str:
        return form.render(f"{text}\n\nSummarize the text above.", "Summary:")

    return Prompt("summary", render(filler.take(_room(form, render(""), length))), length)


def question(form: PromptForm, asked: str, answer: str | None) -> Prompt:
    """Ask a question."""
    return Prompt("question", form.render(asked if form.chat else f"Question: {asked}", "Answer:"), 0, answer)


def retrieval(
    form: PromptForm, filler: Filler, length: int, generator: random.Random, *, depth: float | None = None, keys: int = 1
) -> Prompt:
    """Hide pass keys in a text and ask for one of them, in a prompt of at most ``length`` tokens.

    Args:
        form: Of the prompt.
        filler: The text.
        length: Tokens of the prompt at most.
        generator: Draws the keys, and the places that are not given.
        depth: Where the key that is asked for stands, 0 (start) to 1 (end); None draws it.
        keys: How many keys there are, 1 to 8; with several, each has a city's name.
    """
    names = [""] if keys == 1 else [f" of {name}" for name in generator.sample(_NAMES, keys)]
    numbers = [str(number) for number in generator.sample(range(10000, 100000), keys)]
    hidden = [
        f" The pass key{name} is {number}. Remember it. {number} is the pass key{name}. " for name, number in zip(names, numbers)
    ]
    places = [generator.random() if depth is None else depth, *(generator.random() for _ in names[1:])]

    def render(text: str) -> str:
        request = f"There is a pass key hidden in the text. Remember it.\n{text}\nWhat is the pass key{names[0]}?"
        return form.render(request, "Answer:", f"The pass key{names[0]} is ")

    text = filler.take(_room(form, render("".join(hidden)), length))
    spots = [text.find(" ", round(place * len(text) * 0.98)) for place in places]
    for spot, sentence in sorted(zip(spots, hidden), reverse=True):  # from the end, so that the other spots stay where they are
        text = text[:spot] + sentence + text[spot + 1 :] if spot >= 0 else text + sentence
    return Prompt("retrieval", render(text), length, numbers[0])


def _room(form: PromptForm, empty: str, length: int) -> int:
    room = length - len(form.ids(empty)) - 4  # tokens may divide otherwise where texts meet
    if room < 1:
        raise DataError(f"lengths: a prompt of {length} tokens has no room for a text; {length - room + 1} is the least.")
    return room
