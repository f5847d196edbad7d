"""Chunk likelihoods: what two tokenizers say of the same stretch of text, where their tokens do not match one by one."""

import torch
from torch import Tensor

from ...errors import InputError
from .labels import SoftLabels


def check_chunks(weight: float, temperature: float) -> None:
    """Raise an InputError for a weight or temperature that is out of range."""
    if not 0 <= weight < float("inf"):
        raise InputError(f"chunk_weight={weight} is below 0. Legal: 0 (no chunks) or more.")
    if not 1 <= temperature < float("inf"):
        raise InputError(f"chunk_temperature={temperature} is below 1. Legal: 1 (probabilities as they are) or more.")


def in_chunks(labels: SoftLabels) -> Tensor:
    """Return which tokens belong to a chunk, bool [N]."""
    assert labels.chunk_tokens is not None
    begins = labels.chunk_tokens > 0
    places = begins.nonzero()[:, 0]
    change = torch.zeros(len(labels) + 1, dtype=torch.int64, device=places.device)
    change[places] += 1
    change.index_add_(0, places + labels.chunk_tokens[begins], -torch.ones_like(places))
    return change.cumsum(0)[:-1] > 0


def chunk_loss(log_likelihood: Tensor, labels: SoftLabels, temperature: float) -> Tensor:
    """Return the sum over chunks of the binary KL from the teacher's likelihood of a chunk to the student's, in nats.

    Both likelihoods p become p^(1/t), so that unlikely chunks count too; the result is multiplied by t, which keeps the size of
    the gradient (approximate likelihood matching, arXiv 2503.20083, binarised KL).

    Args:
        log_likelihood: The student's log-probabilities of the tokens in chunks, in order [tokens in chunks], nats.
        labels: Chunks of all N tokens, with the teacher's log-probabilities.
        temperature: t, 1 or more.
    """
    assert labels.chunk_tokens is not None
    assert labels.chunk_log_probability is not None
    begins = labels.chunk_tokens > 0
    sizes = labels.chunk_tokens[begins].long()
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    sums = log_likelihood.new_zeros(len(sizes)).index_add(0, owner, log_likelihood)
    # Certain chunks (p = 1) have an infinite log(1 - p).
    log_p, log_q = (part.clamp(max=-1e-4) / temperature for part in (labels.chunk_log_probability[begins], sums))
    p = log_p.exp()
    rest_p, rest_q = torch.log(-torch.expm1(log_p)), torch.log(-torch.expm1(log_q))
    return temperature * (p * (log_p - log_q) - torch.expm1(log_p) * (rest_p - rest_q)).sum()
