"""Classification by candidates: the answer that a model finds most likely."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError


@dataclass
class Score:
    """How likely a candidate is.

    Args:
        candidate: Its text.
        log_likelihood: Sum of the log-probabilities of its tokens, in nats.
        per_character: The same divided by its characters.
    """

    candidate: str
    log_likelihood: float
    per_character: float


@torch.inference_mode()
def score_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    candidates: list[str],
    *,
    delimiter: str = " ",
    special: bool = True,
) -> list[Score]:
    """Return the score of every candidate as the text that follows a prompt.

    Text is split into tokens as in the evaluation harness (lm-eval, ``multiple_choice``), whose ``acc`` takes the largest
    ``log_likelihood`` and whose ``acc_norm`` the largest ``per_character``: prompt, delimiter and candidate are tokenised
    together, and what comes after as many tokens as the prompt alone has is the candidate's.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        prompt: Text before the candidate; not empty.
        candidates: At least two texts.
        delimiter: Stands between prompt and candidate.
        special: Add special tokens that the tokenizer puts before a text; a chat template has brought them already.

    Raises:
        InputError: If there are fewer than two candidates, one is empty or twice there, or the prompt has no token.
    """
    if len(candidates) < 2 or len({*candidates}) < len(candidates) or not all(candidate.strip() for candidate in candidates):
        raise InputError(f"candidates={candidates!r}: give at least two different texts, none of them empty.")
    spaces = len(prompt) - len(prompt.rstrip())
    begin, space = (prompt[: len(prompt) - spaces], prompt[len(prompt) - spaces :]) if spaces else (prompt, "")
    head = tokenizer(begin, add_special_tokens=special).input_ids
    if not head:
        raise InputError("prompt is empty. Give at least one character to classify.")
    scores = []
    for candidate in candidates:
        whole = tokenizer(begin + space + delimiter + candidate, add_special_tokens=special).input_ids
        ids = torch.tensor([whole], device=model.device)
        count = len(whole) - len(head)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=count).logits[0].float()
        chosen = logits.log_softmax(dim=-1).gather(1, ids[0, len(head) :, None])
        total = float(chosen.sum())
        scores.append(Score(candidate, total, total / len(candidate)))
    return scores
