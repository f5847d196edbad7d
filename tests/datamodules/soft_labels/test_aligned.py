"""Labels of another tokenizer: what a literal loop over bytes says, they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.soft_labels import SoftLabelAppender, SoftLabelStore, StoredSequence, StoreError, StoreHeader
from fulgurite.datamodules.soft_labels.aligned import AlignedExamples, stored_alignment
from fulgurite.datamodules.soft_labels.codec import of_bfloat16
from fulgurite.datamodules.soft_labels.format import read_spelling, write_spelling
from fulgurite.errors import InputError
from fulgurite.modules.distillation import LabelSettings
from fulgurite.modules.distillation.alignment import Spelling
from fulgurite.modules.tokens import tokenizer_fingerprint
from tests.vocabularies import TEXT, TOKENIZERS

SPELLED = {name: Spelling.of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def bits(values):
    return torch.tensor(np.asarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def store_of(folder, teacher, texts, seed=0, end=True):
    """A store with one sequence: some documents and random labels."""
    tokenizer, random = TOKENIZERS[teacher], np.random.default_rng(seed)
    ids, starts = [], []
    for text in texts:
        starts.append(len(ids))
        ids += tokenizer(text, add_special_tokens=False).input_ids
        ids += [SPELLED[teacher].end] if end and SPELLED[teacher].end is not None else []
    supervised = np.ones(len(ids), dtype=bool)
    supervised[-1] = False
    supervised[[start - 1 for start in starts[1:] if start]] = False
    counts = random.integers(0, 7, int(supervised.sum()))
    kept = [random.choice(len(SPELLED[teacher].tokens), count, replace=False) for count in counts]
    values = [np.sort(random.dirichlet(np.ones(count + 1)))[::-1] for count in counts]
    sequence = StoredSequence(
        tokens=np.array(ids, dtype=np.uint32),
        starts=np.array(sorted(set(starts)), dtype=np.uint32),
        supervised=supervised,
        counts=counts.astype(np.uint32),
        ids=np.concatenate([[], *kept]).astype(np.uint32),
        probabilities=bits(np.concatenate([[0.0][:0], *[row[:-1] for row in values]])),
        tail=bits([row[-1] for row in values]),
        realised=bits(-random.exponential(3, len(counts))),
    )
    header = StoreHeader(
        "a",
        "t" * 32,
        tokenizer_fingerprint(tokenizer),
        len(SPELLED[teacher].tokens),
        LabelSettings(k=7),
        "float32",
        codec="plain-1",
    )
    appender = SoftLabelAppender(folder, header)
    appender.append([(header.key(sequence.tokens, sequence.starts, sequence.supervised), sequence)])
    appender.close()
    write_spelling(folder, SPELLED[teacher])
    return SoftLabelStore(folder), sequence


def is_cut(text):
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


def by_literal_loop(sequence, teacher, student, ids, mapping):
    """What each of the student's tokens with the same bytes before it is taught: {id: probability}, tail, row of the teacher."""
    taught, row, before = {}, 0, b""
    values = of_bfloat16(sequence.probabilities).tolist()
    starts = np.cumsum(sequence.counts) - sequence.counts
    for number, token in enumerate(sequence.tokens):
        before += SPELLED[teacher].tokens[token] or b""
        if not sequence.supervised[number]:
            continue
        kept = range(int(starts[row]), int(starts[row] + sequence.counts[row]))
        labels, tail = {}, float(of_bfloat16(sequence.tail)[row])
        for place in kept:
            own = int(mapping[sequence.ids[place]])
            if own < 0:
                tail += values[place]
            else:
                labels[own] = labels.get(own, 0.0) + values[place]
        if not is_cut(before):
            taught[before] = labels, tail, row
        row += 1
    found, own = {}, SPELLED[student].tokens[ids[0]] or b""
    for position in range(1, len(ids)):
        if own in taught:
            found[position - 1] = taught[own]
        own += SPELLED[student].tokens[ids[position]] or b""
    return found


@settings(max_examples=40, deadline=None)
@given(text=TEXT.filter(bool), seed=st.integers(0, 99))
@pytest.mark.parametrize(
    ("teacher", "student"), [("large", "small"), ("small", "large"), ("pieces", "small"), ("large", "pieces"), ("bytes", "large")]
)
def test_labels_are_those_of_the_same_bytes(tmp_path_factory, teacher, student, text, seed):
    store, sequence = store_of(tmp_path_factory.mktemp("s") / "s", teacher, [text], seed, end=False)
    examples = AlignedExamples(store, store.keys, TOKENIZERS[student])
    example = examples[0]
    ids, labels = example["input_ids"].tolist(), example["soft_labels"]
    assert b"".join(SPELLED[student].tokens[number] or b"" for number in ids).decode() == text
    assert len(labels) == len(ids) - 1 == int((example["labels"] != -100).sum())
    expected = by_literal_loop(sequence, teacher, student, ids, stored_alignment(store, TOKENIZERS[student]).ids)
    for row in range(len(labels)):
        kept = labels.ids[row] >= 0
        found = dict(zip(labels.ids[row][kept].tolist(), labels.probabilities[row][kept].float().tolist()))
        wanted, tail, _ = expected.get(row, ({}, 1.0, None))
        assert found == pytest.approx(wanted, rel=2**-8)
        assert float(labels.tail[row]) == pytest.approx(tail, rel=2**-8)
    # Chunks lie between neighbours of what is known, and their likelihood is that of all tokens of the teacher between.
    places = sorted(expected)
    realised = of_bfloat16(sequence.realised).astype(np.float64)
    spans = {place: (after - place, expected[place][2], expected[after][2]) for place, after in zip(places, places[1:])}
    for place, count in enumerate(labels.chunk_tokens.tolist()):
        if place not in spans:
            assert not count or place == places[-1]
            continue
        size, first, last = spans[place]
        assert count == (size if size > 1 or last - first > 1 else 0)
        if count:
            assert float(labels.chunk_log_probability[place]) == pytest.approx(float(realised[first:last].sum()), rel=1e-5)


def test_the_same_tokenizer_changes_nothing(tmp_path):
    store, _ = store_of(tmp_path / "s", "large", ["the sand was grün 雷", "and the glass was green"])
    plain, aligned = store.example(store.keys[0]), AlignedExamples(store, store.keys, TOKENIZERS["large"])[0]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(plain[name], aligned[name]), name
    assert (aligned["soft_labels"].chunk_tokens == 0).all()
    for row in range(len(plain["soft_labels"])):
        ours, theirs = aligned["soft_labels"].ids[row].tolist(), plain["soft_labels"].ids[row].tolist()
        assert set(ours) - {-1} == set(theirs) - {-1}


def test_positions_alone_leave_the_ids(tmp_path):
    store, sequence = store_of(tmp_path / "s", "large", ["the sand was grün 雷"])
    labels = AlignedExamples(store, store.keys, TOKENIZERS["bytes"], "positions")[0]["soft_labels"]
    assert set(labels.ids[labels.ids >= 0].tolist()) <= set(sequence.ids.tolist())
    assert not list((tmp_path / "s").glob("alignment-*"))


def test_documents_begin_anew_and_end(tmp_path):
    store, _ = store_of(tmp_path / "s", "large", ["the sand", "was grün"])
    example = AlignedExamples(store, store.keys, TOKENIZERS["small"])[0]
    assert (example["position_ids"] == 0).sum() == 2
    assert (example["input_ids"] == SPELLED["small"].end).sum() == 2
    begins = example["position_ids"] == 0
    assert (example["labels"][begins] == -100).all()
    assert SPELLED["small"].end in example["labels"].tolist()


def test_what_the_teacher_was_not_asked_for_is_not_asked_of_the_student(tmp_path):
    store, sequence = store_of(tmp_path / "s", "large", ["the sand was green"])
    sequence.supervised[: len(sequence.supervised) // 2] = False
    count = int(sequence.supervised.sum())
    kept = int(sequence.counts[-count:].sum())
    masked = replace(
        sequence,
        counts=sequence.counts[-count:],
        ids=sequence.ids[len(sequence.ids) - kept :],
        probabilities=sequence.probabilities[len(sequence.ids) - kept :],
        tail=sequence.tail[-count:],
        realised=sequence.realised[-count:],
    )
    key = store.header.key(masked.tokens, masked.starts, masked.supervised)
    appender = SoftLabelAppender(tmp_path / "s", store.header)
    appender.append([(key, masked)])
    appender.close()
    again = SoftLabelStore(tmp_path / "s")
    for name in ("large", "bytes"):
        example = AlignedExamples(again, [key], TOKENIZERS[name])[0]
        asked = example["input_ids"][example["labels"] != -100].tolist()
        text = b"".join(SPELLED[name].tokens[number] or b"" for number in asked)
        wanted = b"".join(SPELLED["large"].tokens[number] or b"" for number in masked.tokens[1:][masked.supervised[:-1]])
        assert text == wanted
        assert len(example["soft_labels"]) == len(asked)


def test_sequences_without_text_and_chats(tmp_path):
    end = SPELLED["large"].end
    for name, tokens in (("ends", [end, end]), ("chat", [20, end, 21, 22])):
        header = StoreHeader("a", "t" * 32, "k" * 32, 500, LabelSettings(k=7), "float32", codec="plain-1")
        count = len(tokens)
        empty = np.zeros(0, dtype=np.uint16)
        made = StoredSequence(
            np.array(tokens, dtype=np.uint32), np.zeros(1, np.uint32), np.zeros(count, bool), empty, empty, empty, empty, empty
        )
        appender = SoftLabelAppender(tmp_path / name, header)
        appender.append([(header.key(made.tokens, made.starts, made.supervised), made)])
        appender.close()
        write_spelling(tmp_path / name, SPELLED["large"])
        store = SoftLabelStore(tmp_path / name)
        examples = AlignedExamples(store, store.keys, TOKENIZERS["pieces"])
        if name == "chat":
            with pytest.raises(InputError, match="in the middle of a sequence is a special one"):
                examples[0]
        else:
            assert examples[0]["labels"].tolist() == [-100]
            assert len(examples[0]["soft_labels"]) == 0


def test_the_third_vocabulary_is_what_labels_and_texts_have(tmp_path):
    store, _ = store_of(tmp_path / "s", "large", ["the sand was grün 雷"])
    examples = AlignedExamples(store, store.keys, TOKENIZERS["small"])
    ids = examples[0]["soft_labels"].ids
    wanted = set(examples[0]["input_ids"].tolist()) | set(ids[ids >= 0].tolist())
    assert examples.label_vocabulary().tolist() == sorted(wanted)


def test_the_alignment_stays_with_the_store(tmp_path):
    store, _ = store_of(tmp_path / "s", "large", ["the sand"])
    made = stored_alignment(store, TOKENIZERS["small"])
    (path,) = (tmp_path / "s").glob("alignment-*.npz")
    again = stored_alignment(store, TOKENIZERS["small"])
    np.testing.assert_array_equal(made.ids, again.ids)
    np.testing.assert_array_equal(made.exact, again.exact)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"is damaged .* Delete it"):
        stored_alignment(store, TOKENIZERS["small"])


def test_spelling_is_read_as_it_was_written_or_refused(tmp_path):
    write_spelling(tmp_path, SPELLED["pieces"])
    assert read_spelling(tmp_path) == Spelling(list(SPELLED["pieces"].tokens), SPELLED["pieces"].end)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:7], b"", whole[:30] + bytes([whole[30] ^ 1]) + whole[31:]):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            read_spelling(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match="only students with the teacher's tokenizer"):
        read_spelling(tmp_path)
