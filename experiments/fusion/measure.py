"""What operators were learnt, how fast a fused model decodes, and what a step through operators costs."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...modules.fusion import FusionShape, LearnedFusion, OperatorForms
from ...modules.fusion.fused import materialise
from ...modules.fusion.reading import text_loss
from ...modules.fusion.statistics import rows_of
from ...modules.optimizers import MuonAdamW
from ...modules.precision import Dtype, compute_device
from ...modules.pretrained import load_model
from ..measuring import extra_memory, pairs

_LENGTH = 512  # tokens of a row


def operators(*, seed: int, model: str) -> dict[str, Any]:
    """Read what the operators of a run came to, where its start has some.

    Args:
        seed: Not used.
        model: Folder of the exported model.

    Returns:
        ``curves``: ``depth_<layer>``, the coefficients of a small layer, and ``singular_<kind>``.
    """
    path = Path(model) / "fusion.json"
    learnt = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    lines = {f"depth_{place}": row for place, row in enumerate(learnt.get("depth", []))}
    lines |= {f"singular_{kind}": values for kind, values in learnt.get("singular_values", {}).items()}
    return {"metrics": {}, "curves": {name: [[place, value] for place, value in enumerate(row)] for name, row in lines.items()}}


def decoding(*, seed: int, model: str, source: str, tokens: int, rounds: int, weights: Dtype = "float32") -> dict[str, float]:
    """Write tokens with the small model and with the large one, in turns.

    Args:
        seed: Of the prompt's tokens.
        model: Source of the small model.
        source: Source of the large one.
        tokens: That are written a turn.
        rounds: Turns that are counted.
        weights: Type of the weights in memory.

    Returns:
        ``parameters`` and ``parameters_without_embedding`` of the small model; ``bytes`` of its weights on disk;
        ``decode_tokens_per_second``, and ``decode_speedup`` against the large model.
    """
    device: Any = compute_device()
    small, large = (load_model(name, weights).to(device).eval() for name in (model, source))
    prompt = torch.randint(0, int(small.config.vocab_size), (1, 64), generator=torch.Generator().manual_seed(seed)).to(device)

    def write(written_by: Any) -> None:
        written_by.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    seconds, _, ratio = pairs(partial(write, small), partial(write, large), rounds, "decoding")
    parameters = sum(part.numel() for part in small.parameters())
    embedding = small.get_input_embeddings().weight.numel()
    return {
        "parameters": parameters,
        "parameters_without_embedding": parameters - embedding,
        "bytes": sum(file.stat().st_size for file in Path(model).glob("*.safetensors")),
        "decode_tokens_per_second": tokens / seconds,
        "decode_speedup": 1 / ratio,
    }


def operator_step(
    *, seed: int, source: str, shape: dict[str, int], form: str, tokens: int, rounds: int, checkpointing: bool = False
) -> dict[str, float]:
    """Take a training step through operators, and one of the plain small model that they make, on hard labels.

    Args:
        seed: Of the tokens.
        source: Source of the large model.
        shape: See ``FusionShape``; widths and layers are fused at once.
        form: See ``OperatorForms``, of neurons and heads.
        tokens: Of a step, in rows of 512.
        rounds: Turns that are counted.
        checkpointing: Compute activations again in the backward pass, in both.

    Returns:
        ``step_seconds`` of the operators, ``plain_step_seconds``, and ``times_as_long``. In bytes: ``small_bytes``, the small
        model's weights; ``operator_bytes``, those of all that is learnt, with gradients and the moments of ``MuonAdamW``;
        ``step_bytes`` and ``plain_step_bytes``, by how much a step makes the process grow; ``beyond_bytes``, what the step with
        operators needs more. As shares of ``small_bytes``: ``beyond_share``; ``total_share``, with ``operator_bytes``.
    """
    torch.manual_seed(seed)
    device: Any = compute_device()
    large: PreTrainedModel = load_model(source, "float32").to(device)
    ids = torch.randint(0, int(large.config.vocab_size), (tokens // _LENGTH, _LENGTH)).to(device)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(_LENGTH, device=device).expand_as(ids)}
    forms = OperatorForms(neurons=form, heads=form)  # type: ignore[arg-type]
    start = LearnedFusion(refit=False, fold=False, order="joint", operators=forms)
    resolved = FusionShape(**shape).resolve(large.config)
    fused = start.begin("joint", large, resolved, rows_of({name: part[:2] for name, part in batch.items()})).model
    plain = materialise(fused).train()
    (through, optimizer), (direct, _) = (_stepper(model, batch, checkpointing) for model in (fused, plain))
    for step in (through, direct):
        step()  # gradients and moments are there now
    own, other = (max(extra_memory(step) for _ in range(2)) for step in (through, direct))
    seconds, plain_seconds, ratio = pairs(through, direct, rounds, f"{tokens} tokens")
    small = sum(part.nbytes for part in plain.parameters())
    learnt = 2 * sum(part.nbytes for part in fused.parameters() if part.requires_grad)
    learnt += sum(part.nbytes for own in optimizer.state.values() for part in own.values() if isinstance(part, torch.Tensor))
    return {
        "step_seconds": seconds,
        "plain_step_seconds": plain_seconds,
        "times_as_long": ratio,
        "small_bytes": small,
        "operator_bytes": learnt,
        "step_bytes": own,
        "plain_step_bytes": other,
        "beyond_bytes": own - other,
        "beyond_share": (own - other) / small,
        "total_share": (own - other + learnt) / small,
    }


def _stepper(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], checkpointing: bool
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = MuonAdamW([part for part in model.parameters() if part.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.autocast(compute_device(), torch.bfloat16):
            loss = text_loss(model, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step, optimizer
