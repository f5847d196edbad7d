"""``fulgurite generate``: text from a model, streamed."""

import sys

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..errors import InputError
from ..modules.language_model import GenerationSettings
from ..modules.pretrained import Dtype, load_model, load_tokenizer


def generate(
    model: str,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    weights: Dtype = "bfloat16",
) -> None:
    """Write the continuation of a prompt as it is generated.

    Args:
        model: An exported folder, or any other model source.
        prompt: Text to go on with; ``-`` reads it from the standard input.
        chat: Ask the prompt as a user's question, through the model's chat template.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature.
        top_p: Tokens are drawn from the smallest set with this probability mass, in (0, 1].
        seed: Seed of the drawing.
        weights: Type of the weights in memory.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    settings.kwargs()  # checked before the weights are read
    text = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = load_tokenizer(model)
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"chat=True, but the tokenizer of model={model!r} has no chat template: leave out --chat.")
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    continue_text(load_model(model, weights), tokenizer, text, settings, seed=seed, special=not chat, stream=True)


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    settings: GenerationSettings,
    *,
    seed: int = 0,
    special: bool = True,
    stream: bool = False,
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
    """
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    if inputs.input_ids.shape[1] == 0:
        raise InputError("prompt is empty. Give at least one character to go on with.")
    torch.manual_seed(seed)
    written = model.generate(  # type: ignore[operator]
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **settings.kwargs(),
    )
    return str(tokenizer.decode(written[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def main(arguments: list[str]) -> None:
    """Run ``generate`` with the words of a command line."""
    auto_cli(generate, args=arguments, prog="fulgurite generate", as_positional=False)
