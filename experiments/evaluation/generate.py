"""``fulgurite generate``: what a model writes after a prompt, for four uses."""

import logging
import sys
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ...errors import InputError
from ...modules.language_model import GenerationSettings
from ...modules.offsite import OffsitePrefixTuning, OwnerAccess, behind_prefix
from ...modules.precision import FrozenDtype, compute_device, frozen_dtype
from ...modules.pretrained import load_model, load_tokenizer
from ..parsing import Parser
from .candidates import score_candidates
from .code_execution import run_code
from .templates import Task, template


def generate(
    model: str,
    prompt: str,
    *,
    task: Task = "text",
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    candidates: list[str] | None = None,
    source_language: str = "English",
    target_language: str = "French",
    tests: str | None = None,
    execute: bool = False,
    prefix: str | None = None,
    split: str | None = None,
    token: str | None = None,
    certificate: str | None = None,
    head: Literal["party", "owner"] = "party",
    weights: FrozenDtype = "auto",
) -> None:
    """Write what follows a prompt; plain text is streamed as it is generated.

    Args:
        model: An exported folder, or any other model source.
        prompt: Text to go on with, to translate or to classify, or function to complete; ``-`` reads the standard input.
        task: ``text``; ``code`` stops behind the function; ``translation`` stops at the line's end; ``classification`` scores
            candidates instead of writing.
        chat: Ask the prompt as a user's question, through the model's chat template.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature.
        top_p: Tokens are drawn from the smallest set with this probability mass, in (0, 1].
        seed: Seed of the drawing.
        candidates: Of classification: the answers to choose from, ``[good,bad]``.
        source_language: Of translation: the prompt's language.
        target_language: Of translation: the language to write.
        tests: Of code: Python statements that raise when the function is wrong, such as ``assert f(1) == 2``.
        execute: Of code: really run what the model wrote with the tests, in a process with little time and memory. That is no
            jail: only do it with models that you trust.
        prefix: Folder of a prefix to write behind; one of an emulator is carried over to the whole model.
        split: Address of an owner, ``host:port``, whose layers are used; the model is then the folder of the owner's emulator.
        token: With ``split``: file with the party's token.
        certificate: With ``split``: PEM file of the certificate that the owner's is checked against.
        head: With ``split``: who turns states into tokens.
        weights: Type of the weights in memory.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    settings.kwargs()  # all is checked before the weights are read
    form = template(task)
    for name, value, use in (
        ("candidates", candidates, "classification"),
        ("tests", tests, "code"),
        ("execute", execute, "code"),
    ):
        if value and task != use:
            raise InputError(f"--{name} is for --task {use}; the task is {task!r}.")
    if task == "classification" and not candidates:
        raise InputError("--task classification needs --candidates, such as --candidates '[good,bad]'.")
    if bool(tests) != execute:
        raise InputError("--tests and --execute true go together: generated code is only run on the explicit flag.")
    offsite = _offsite(model, prefix, split, token, certificate, head, settings, weights)
    if offsite is not None and candidates:
        raise InputError(
            "--candidates cannot be scored with --prefix or --split: leave them out, or validate with offsite/plug_in."
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = load_tokenizer(model)
    asked = form.fill(text, source_language, target_language)
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"chat=True, but the tokenizer of model={model!r} has no chat template: leave out --chat.")
        messages = [{"role": "user", "content": asked}]
        asked = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    length = 0
    if offsite is None:
        loaded = load_model(model, frozen_dtype(weights)).to(compute_device())  # type: ignore[arg-type]
    else:
        offsite.configure_model()
        assert offsite.model is not None
        offsite.to(compute_device())
        loaded, length = offsite.model.eval(), offsite.length
    if candidates:
        _show(score_candidates(loaded, tokenizer, asked, candidates, special=not chat))
        return
    if not form.ends:
        continue_text(loaded, tokenizer, asked, settings, seed=seed, special=not chat, stream=True, length=length)
        return
    written = continue_text(loaded, tokenizer, asked, settings, seed=seed, special=not chat, ends=form.ends, length=length)
    print(written.strip() if task == "translation" else text + written)
    if tests and execute:
        good, message = run_code(f"{text}{written}\n\n{tests}\n")
        print(f"tests passed{f': {message}' if message else ''}" if good else f"tests failed: {message}")


def _offsite(
    model: str,
    prefix: str | None,
    split: str | None,
    token: str | None,
    certificate: str | None,
    head: Literal["party", "owner"],
    settings: GenerationSettings,
    weights: FrozenDtype,
) -> OffsitePrefixTuning | None:
    """Return the system that writes behind a prefix or through a split, None where neither is wanted."""
    access = None
    if split is not None:
        if token is None or certificate is None:
            raise InputError("--split needs --token and --certificate, the files that the owner gave.")
        access = OwnerAccess(split, token, certificate)
    elif token is not None or certificate is not None or head != "party":
        raise InputError("--token, --certificate and --head owner are for --split.")
    if access is None and prefix is None:
        return None
    phase: Literal["split", "plug_in"] = "plug_in" if access is None else "split"
    return OffsitePrefixTuning(
        model, phase=phase, prefix=None, start=prefix, owner=access, head=head, weights=weights, generation=settings
    )


def _show(scores: list) -> None:
    table = Table()
    table.add_column("candidate")
    for column in ("log-likelihood (nats)", "per character", ""):
        table.add_column(column, justify="right")
    best = max(scores, key=lambda score: score.log_likelihood)
    for score in scores:
        chosen = "chosen" if score is best else ""
        table.add_row(escape(score.candidate), f"{score.log_likelihood:.4f}", f"{score.per_character:.4f}", chosen)
    Console().print(table)


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    settings: GenerationSettings,
    *,
    seed: int = 0,
    special: bool = True,
    stream: bool = False,
    ends: tuple[str, ...] = (),
    length: int = 0,
) -> str:
    """Return what a model writes after a text.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        text: The text; not empty.
        settings: How to write.
        seed: Seed of the drawing.
        special: Add special tokens that the tokenizer puts before a text.
        stream: Also print the text as it comes.
        ends: Texts that end the writing, themselves left out.
        length: Virtual positions of a prefix that the model has.
    """
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special).to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise InputError("prompt is empty. Give at least one character to go on with.")
    asked = behind_prefix({name: inputs[name] for name in ("input_ids", "attention_mask")}, length)
    torch.manual_seed(seed)
    written = model.generate(  # type: ignore[operator]
        **asked,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"stop_strings": list(ends), "tokenizer": tokenizer} if ends else {}),
        **settings.kwargs(),
    )
    answer = str(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    places = [place for end in ends if (place := answer.find(end)) >= 0]
    return answer[: min(places)] if places else answer


def main(arguments: list[str]) -> None:
    """Run ``generate`` with the words of a command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fulgurite").setLevel(logging.INFO)  # such as: this model has spans
    auto_cli(generate, args=arguments, prog="fulgurite generate", as_positional=False, parser_class=Parser)
