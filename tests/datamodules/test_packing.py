import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.packing import PackedBlocks, Stretch, collate, split_documents
from fulgurite.modules import LanguageModel, SoftLabelTeacher
from fulgurite.modules.distillation import LabelSettings
from fulgurite.modules.tiny import tiny_model


class Documents:
    """Documents in memory with the attributes of a TokenCache; token values name their document and place."""

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.order = np.arange(len(lengths))
        self.tokens = np.concatenate([np.arange(n) + 1000 * (d + 1) for d, n in enumerate(lengths)] or [np.empty(0)])

    def document(self, index):
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def pieces_of(block):
    starts = (block["position_ids"] == 0).nonzero()[:, 0].tolist()
    return [block["input_ids"][a:b].tolist() for a, b in zip(starts, [*starts[1:], len(block["input_ids"])])]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    block_size=st.integers(2, 17),
    bos=st.sampled_from([None, 7]),
    eos=st.sampled_from([None, 8]),
)
@settings(max_examples=150, deadline=None)
def test_blocks_hold_the_documents_in_order(lengths, block_size, bos, eos):
    documents = Documents(lengths)
    stretches = split_documents(documents, 0.0)[0]
    blocks = PackedBlocks(documents, stretches, block_size=block_size, bos=bos, eos=eos)
    seen = []
    for index in range(len(blocks)):
        block = blocks[index]
        assert all(len(block[name]) == block_size for name in ("input_ids", "labels", "position_ids"))
        for piece in pieces_of(block):
            if bos is not None:
                assert piece[0] == bos
                piece = piece[1:]
            owners = {token // 1000 for token in piece if token >= 1000}
            assert len(owners) <= 1
            seen += piece
        head = block["position_ids"] == 0
        assert bool((block["labels"][head] == -100).all())
        assert torch.equal(block["labels"][~head], block["input_ids"][~head])
    expected = [
        token
        for document, length in enumerate(lengths)
        if length
        for token in [*documents.document(document).tolist(), *([] if eos is None else [eos])]
    ]
    assert seen == expected[: len(seen)]
    assert len(expected) - len(seen) < block_size * (1 if bos is None else 2)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9), fraction=st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_split_shares_out_every_token_once(lengths, fraction):
    documents = Documents(lengths)
    first, second = split_documents(documents, fraction)
    tokens = [[(s.document, p) for s in part for p in range(s.start, s.stop)] for part in (first, second)]
    assert sorted(tokens[0] + tokens[1]) == [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    assert abs(len(tokens[1]) - fraction * sum(lengths)) <= 0.5 + 1e-6


@pytest.mark.parametrize("bos", [None, 1])
def test_packed_documents_are_computed_as_if_alone(bos):
    lengths = [13, 5, 30, 9, 16]
    documents = Documents(lengths)
    documents.tokens = torch.randint(3, 259, (sum(lengths),), generator=torch.Generator().manual_seed(1)).numpy()
    stretches = [Stretch(d, 0, n) for d, n in enumerate(lengths)]
    blocks = PackedBlocks(documents, stretches, block_size=32, bos=bos)
    batch = collate([blocks[0], blocks[1]])
    module = LanguageModel("random:tiny")
    module.configure_model()
    module.eval()
    with torch.no_grad():
        packed = module.hidden_states(batch)
        reference = tiny_model().eval()
        checked = 0
        for row in range(2):
            begin = 0
            for piece in pieces_of(blocks[row]):
                alone = reference.base_model(torch.tensor([piece]), use_cache=False).last_hidden_state[0]
                assert torch.allclose(packed[row, begin : begin + len(piece)], alone, atol=1e-5)
                begin += len(piece)
                checked += 1
    assert checked >= 4
    # The same in capture: the teacher's labels of a packed block are those of its documents alone.
    teacher = SoftLabelTeacher("random:tiny", selection=LabelSettings(k=3), weights="float32")
    teacher.configure_model()
    captured = teacher.predict_step(collate([blocks[0]]), 0).labels
    expected = []
    for piece in pieces_of(blocks[0]):
        with torch.no_grad():
            logits = reference(torch.tensor([piece]), use_cache=False).logits[0, :-1]
        expected.append(logits.softmax(1).topk(3).values)
    assert torch.allclose(captured.probabilities.float(), torch.cat(expected), rtol=0.01)
    # And in validation: the loss is the mean over the documents' tokens.
    parts = module.loss_parts(collate([blocks[0]]))
    losses = [
        reference(torch.tensor([piece]), labels=torch.tensor([piece]), use_cache=False).loss * (len(piece) - 1)
        for piece in pieces_of(blocks[0])
        if len(piece) > 1
    ]
    assert torch.allclose(parts.hard, sum(losses) / parts.tokens, atol=1e-5)


def test_right_padding_changes_nothing():
    module = LanguageModel("random:tiny")
    module.configure_model()
    examples = []
    for length in (6, 11):
        ids = torch.arange(3, 3 + length)
        examples.append({"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length)})
    batch = collate(examples)
    assert batch["lengths"].tolist() == [6, 11]
    together = module.loss_parts(batch)
    alone = [module.loss_parts(collate([example])) for example in examples]
    expected = sum(part.hard * part.tokens for part in alone) / sum(part.tokens for part in alone)
    assert torch.allclose(together.hard, expected, atol=1e-5)
