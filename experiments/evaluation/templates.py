"""Prompts of the four uses of a language model: text, code, translation, classification."""

from dataclasses import dataclass
from typing import Literal

from ...errors import InputError

Task = Literal["text", "code", "translation", "classification"]


@dataclass(frozen=True)
class Template:
    """How a use is asked for, and where its answer ends.

    Args:
        form: The prompt; ``{prompt}`` stands for the user's text, ``{source}`` and ``{target}`` for languages.
        ends: Texts that end the answer, themselves left out.
    """

    form: str
    ends: tuple[str, ...] = ()

    def fill(self, prompt: str, source: str = "English", target: str = "French") -> str:
        """Return the whole prompt for a user's text."""
        return self.form.format(prompt=prompt, source=source, target=target)


TEMPLATES: dict[str, Template] = {
    "text": Template("{prompt}"),
    # A function's head and docstring are continued (HumanEval, arXiv 2107.03374); what follows the function is cut off.
    "code": Template("{prompt}", ("\nclass ", "\ndef ", "\nasync def ", "\n#", "\nif ", "\nprint", "\n@", "\nassert ", "\n```")),
    "translation": Template("{source}: {prompt}\n{target}:", ("\n",)),
    "classification": Template("{prompt}"),
}


def template(task: str) -> Template:
    """Return the template of a task.

    Raises:
        InputError: If there is none of that name.
    """
    if task not in TEMPLATES:
        raise InputError(f"task={task!r} is unknown. Legal: {', '.join(TEMPLATES)}.")
    return TEMPLATES[task]
