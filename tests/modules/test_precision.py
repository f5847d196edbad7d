"""Which type of numbers ``auto`` is."""

import pytest
import torch

from fulgurite.modules import SoftLabelDistillation, SoftLabelTeacher
from fulgurite.modules.precision import fast_in_bfloat16, frozen_dtype


@pytest.mark.parametrize(
    ("able", "platform", "fast"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "linux", False),
        ({"avx512_bf16": True}, "linux", True),
        ({"avx512_bf16": False, "amx_bf16": True}, "linux", True),
        ({"neon": True, "bf16": True}, "linux", True),
        ({"neon": True, "bf16": True}, "darwin", False),
        ({"neon": True, "bf16": False}, "linux", False),
    ],
)
def test_processors_with_instructions_for_bfloat16_use_it(monkeypatch, able, platform, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr("sys.platform", platform)
    assert fast_in_bfloat16("cpu") is fast
    assert frozen_dtype("auto", "cpu") == ("bfloat16" if fast else "float32")


@pytest.mark.parametrize("able", [True, False])
def test_what_is_not_trained_is_in_the_type_that_is_fast_and_what_is_trained_in_float32(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    expected = "bfloat16" if able else "float32"
    assert SoftLabelTeacher("random:tiny").weights == expected, "a store says in which type its teacher computed"
    student = SoftLabelDistillation("random:tiny", teacher="random:tiny")
    student.configure_model()
    assert student.model is not None
    assert [student.model.dtype, student._teacher[0].dtype] == [torch.float32, getattr(torch, expected)]
    assert student.hparams["teacher_weights"] == "auto", "a checkpoint is read on another machine as well"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_given_stays(dtype):
    assert frozen_dtype(dtype) == dtype
