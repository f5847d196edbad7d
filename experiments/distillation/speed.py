"""Speed and memory of capture, of the loss and of training from a store; measured by ``benchmark distillation/speed``.

Every pair that is compared runs in turns in one process on the same batches; the figures are medians, the ratios medians of the
ratios of neighbours.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ...callbacks.soft_label_writer import to_sequences
from ...datamodules import SoftLabelDataModule, TextDataModule
from ...datamodules.soft_labels import SoftLabelAppender, StoreHeader
from ...errors import InputError
from ...modules import SoftLabelDistillation, SoftLabelTeacher
from ...modules.distillation import LabelSettings
from ...modules.linear_loss import linear_loss
from ...modules.pretrained import load_config
from ...modules.student import StudentSpec
from ...modules.tokens import tokenizer_fingerprint
from ..measuring import extra_memory, pairs

BLOCK, BATCH = 512, 2


def batches(source: str, count: int) -> list[dict[str, Any]]:
    """Return the first training batches of the embedded text."""
    data = TextDataModule(
        tokenizer=source, block_size=BLOCK, batch_size=BATCH, train_tokens=BLOCK * BATCH * count, val_fraction=0
    )
    data.prepare_data()
    data.setup()
    return list(data.train_dataloader())


def capture(*, seed: int, rounds: int, source: str) -> dict[str, float]:
    """Labelling and writing a batch against a bare forward pass of the same model."""
    torch.manual_seed(seed)
    teacher = SoftLabelTeacher(source)
    teacher.configure_model()
    model = teacher.model
    assert model is not None
    given = batches(source, 4)
    with tempfile.TemporaryDirectory() as folder:
        appender = SoftLabelAppender(Path(folder) / "store", _header(teacher))
        turn = [0]

        def label() -> None:
            batch = given[turn[0] % len(given)]
            turn[0] += 1
            # A first document of its own makes every batch a new one to the store.
            batch = {**batch, "input_ids": batch["input_ids"].clone()}
            batch["input_ids"][:, 0] = turn[0]
            prediction = teacher.predict_step(batch, 0)
            assert prediction is not None
            appender.append(to_sequences(appender.header, batch, prediction))

        @torch.inference_mode()
        def bare() -> None:
            batch = given[turn[0] % len(given)]
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)

        seconds, reference, ratio = pairs(label, bare, rounds, "capture")
        appender.close()
    return _figures(seconds, reference, ratio)


def _figures(seconds: float, reference: float, ratio: float) -> dict[str, float]:
    tokens = BLOCK * BATCH
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_of_the_other": tokens / reference,
        "times_as_fast": 1 / ratio,
    }


def _header(teacher: SoftLabelTeacher) -> StoreHeader:
    assert teacher.model is not None
    return StoreHeader(
        teacher=teacher.source.title,
        teacher_fingerprint=teacher.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(teacher.tokenizer),
        vocabulary=teacher.model.config.vocab_size,
        settings=teacher.selection,
        weights=teacher.weights,
    )


class Steps:
    """Training steps of one student, in bf16-mixed.

    Args:
        source: Teacher, of which the student is made.
        spec: The student.
    """

    def __init__(self, source: str, spec: StudentSpec) -> None:
        self.student = SoftLabelDistillation(source, student=spec, teacher=source, selection=LabelSettings(selection="full"))
        self.student.configure_model()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.count = 0

    def step(self, loss: Callable[[dict[str, Any]], torch.Tensor], given: list[dict[str, Any]]) -> None:
        """Take one step on the next of the batches, whose ``loss`` is a scalar []."""
        batch = given[self.count % len(given)]
        self.count += 1
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(batch)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss on the batch's stored labels, or on the online teacher's."""
        return self.student.loss_parts(batch).loss

    def theirs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return transformers' own loss on the hard labels."""
        inputs = {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
        assert self.student.model is not None
        return self.student.model(**inputs, use_cache=False).loss


# Shapes of a student with an eighth of the teacher's 134.5 M parameters, head included.
_SMALL = {"hidden_size": 288, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6}


def training(
    *, seed: int, rounds: int, source: str, student: Literal["keep", "fresh"], against: Literal["hard", "online"]
) -> dict[str, float]:
    """A training step on stored labels against hard labels through transformers' loss, or against an online teacher."""
    torch.manual_seed(seed)
    layers = load_config(source).num_hidden_layers
    kept = [*range(layers - 10), layers - 2, layers - 1] if layers > 12 else [0, layers - 1]  # 22 of 30, as in the demo
    fresh = {**_SMALL, "num_key_value_heads": 3, "head_dim": 48}
    steps = Steps(source, StudentSpec(kept) if student == "keep" else StudentSpec(fresh=fresh))
    given = batches(source, 4)
    with tempfile.TemporaryDirectory() as folder:
        _fill_store(source, Path(folder) / "store", given)
        data = SoftLabelDataModule(str(Path(folder) / "store"), val_fraction=0, tokenizer=source, batch_size=BATCH)
        data.setup()
        assert data.store is not None
        store, keys = data.store, data.store.keys[:BATCH]
        decode = _median(lambda: [store.example(key) for key in keys], 5)
        stored = list(data.train_dataloader())
    other = steps.theirs if against == "hard" else steps.ours
    seconds, reference, ratio = pairs(
        partial(steps.step, steps.ours, stored), partial(steps.step, other, given), rounds, f"{student}, {against}"
    )
    return {**_figures(seconds, reference, ratio), "share_of_reading": decode / seconds}


def _fill_store(source: str, folder: Path, given: list[dict[str, Any]]) -> None:
    teacher = SoftLabelTeacher(source)
    teacher.configure_model()
    appender = SoftLabelAppender(folder, _header(teacher))
    for batch in given:
        prediction = teacher.predict_step(batch, 0)
        assert prediction is not None
        appender.append(to_sequences(appender.header, batch, prediction))
    appender.close()


def _median(function: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def memory(
    *, seed: int, rounds: int, precision: Literal["float32", "bf16-mixed"], tokens: int, vocabulary: int
) -> dict[str, float]:
    """Peak extra memory of forward and backward of the loss, against full logits; the largest of all turns, in MiB."""
    torch.manual_seed(seed)
    hidden = 576
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    weight.grad, states.grad = torch.zeros_like(weight), torch.zeros_like(states)  # both forms add to what is there

    def ours() -> None:
        linear_loss(states, weight, labels).loss.backward()

    def full() -> None:
        torch.nn.functional.cross_entropy((states @ weight.t()).float(), labels).backward()

    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        # What the libraries set up once, at their first product of this type, is not the loss's.
        torch.nn.functional.linear(states[:8], weight[:64]).sum().backward()
        linear_loss(states[:8], weight[:64], labels[:8] % 64).loss.backward()
        one = max(extra_memory(ours) for _ in range(rounds))
        other = max(extra_memory(full) for _ in range(rounds))
    if not other:
        raise InputError(
            f"tokens={tokens} of vocabulary={vocabulary} take no new memory that could be compared; take more of them."
        )
    return {"extra_mib": one / 2**20, "full_logits_mib": other / 2**20, "share": one / other}
