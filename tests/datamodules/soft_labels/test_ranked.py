"""The small codec: what is read is what was rounded, whatever was learnt, and a store is readable however its writer ended."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.soft_labels import SoftLabelAppender, SoftLabelStore, StoredSequence, StoreError, StoreHeader
from fulgurite.datamodules.soft_labels.codec import PlainCodec
from fulgurite.datamodules.soft_labels.ranked import RankedCodec
from fulgurite.datamodules.soft_labels.steps import ValueSteps
from fulgurite.datamodules.soft_labels.tables import LabelTables, tables_path
from fulgurite.errors import InputError
from fulgurite.modules.distillation import LabelSettings


def bits(values):
    whole = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((whole + 0x8000) >> 16).astype(np.uint16)


def numbers(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


def sequence(seed, length=30, vocabulary=500, most=12, topics=4):
    """Labels of tokens of a few kinds, each with favourite ids of its own."""
    random = np.random.default_rng(seed)
    supervised = random.random(length) < 0.9
    supervised[-1] = False
    counts = random.integers(0, most + 1, int(supervised.sum()))
    ids, probabilities, tail = [], [], []
    for count in counts:
        weights = 1.0 / (1 + (np.arange(vocabulary) * (1 + 2 * random.integers(topics)) % vocabulary))
        ids.append(random.choice(vocabulary, count, replace=False, p=weights / weights.sum()))
        p = np.sort(random.dirichlet(np.full(count + 1, 0.3)))[::-1]
        probabilities.append(p[:count])
        tail.append(1 - p[:count].sum())
    return StoredSequence(
        tokens=random.integers(0, vocabulary, length).astype(np.uint32),
        starts=np.array([0], dtype=np.uint32),
        supervised=supervised,
        counts=counts.astype(np.uint32),
        ids=np.concatenate([[], *ids]).astype(np.uint32),
        probabilities=bits(np.concatenate([[], *probabilities])),
        tail=bits(np.clip(tail, 0, 1)),
        realised=bits(-random.exponential(3, len(counts))),
    )


STEPS = ValueSteps()


def codec_for(vocabulary, steps=STEPS, learnt=()):
    """A codec that has learnt from some sequences, and its tables."""
    tables = {}
    codec = RankedCodec(vocabulary, steps, tables.__getitem__)
    if learnt:
        parts = [codec.rounded(part) for part in learnt]
        whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        tables[1] = codec.learn(type(parts[0])(**whole))
        codec.number = 1
    return codec


def assert_same_labels(codec, found, wanted):
    for name in ("tokens", "starts", "supervised", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    table, samples = codec.steps.table(), codec.steps.floor > 0 or codec.steps.values == "even"
    ends = np.cumsum(wanted.counts)[:-1].astype(int)
    columns = [
        np.split(part, ends) for part in (found.ids, numbers(found.probabilities), wanted.ids, numbers(wanted.probabilities))
    ]
    for ids, values, own, p, tail, meant in zip(*columns, numbers(found.tail).astype(float), numbers(wanted.tail)):
        assert (np.diff(values) <= 0).all()
        rounded = numbers(bits(table[codec.steps.level(p)]))
        steps_of_tail = float(numbers(bits([(np.rint(np.sqrt(meant) * 255) / 255) ** 2]))[0])
        mass = 1.0 if samples else max(1.0, float(rounded.sum(dtype=float)) + steps_of_tail)
        assert samples or values.sum(dtype=float) + tail <= 1
        expected = dict(zip(own.tolist(), rounded / mass))
        assert set(expected) == set(ids.tolist())
        np.testing.assert_allclose(values, [expected[number] for number in ids.tolist()], rtol=2**-7 if mass > 1 else 0)
        assert tail == pytest.approx(steps_of_tail / mass, rel=2**-7)
    np.testing.assert_allclose(numbers(found.realised), numbers(wanted.realised), atol=1 / 60, rtol=0.005)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 40),
    vocabulary=st.integers(2, 3000),
    steps=st.sampled_from(
        [
            ValueSteps(),
            ValueSteps("sqrt", 0.003),
            ValueSteps("log", 0.05),
            ValueSteps("sqrt", 0.01, 0.025),
            ValueSteps("even", 0.02),
        ]
    ),
    learnt=st.integers(0, 3),
)
def test_what_is_read_is_what_was_rounded(seed, length, vocabulary, steps, learnt):
    made = sequence(seed, length, vocabulary, min(12, vocabulary))
    codec = codec_for(vocabulary, steps, [sequence(seed + 1 + n, 30, vocabulary, min(9, vocabulary)) for n in range(learnt)])
    assert_same_labels(codec, codec.decode(codec.encode(made)), made)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.data())
def test_records_that_are_cut_or_changed_are_refused_or_labels(seed, data):
    codec = codec_for(500, learnt=[sequence(seed + 1)])
    encoded = bytearray(codec.encode(sequence(seed)))
    if data.draw(st.booleans()):
        del encoded[data.draw(st.integers(0, len(encoded) - 1)) :]
    else:
        encoded[data.draw(st.integers(4, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = codec.decode(bytes(encoded))
    except StoreError:
        return
    assert (found.ids < 500).all()
    assert int(found.counts.sum()) == len(found.ids)


def test_what_was_learnt_makes_records_small():
    made = [sequence(seed, 200, most=40) for seed in range(12)]
    plain, unlearnt, learnt = PlainCodec(500), codec_for(500), codec_for(500, learnt=made[:10])
    sizes = [sum(len(codec.encode(part)) for part in made[10:]) for codec in (plain, unlearnt, learnt)]
    assert sizes[2] < 0.85 * sizes[1] < 0.85 * sizes[0]


def test_topics_of_many_labels_are_those_of_few_at_once(monkeypatch):
    made = [sequence(seed, 200, most=40) for seed in range(4)]
    codec = codec_for(500, learnt=made)
    labels = codec.rounded(made[0])
    starts = np.cumsum(filled := labels.counts[labels.counts > 0]) - filled
    at_once = codec.tables(1).topic_of(labels.ids, starts)
    monkeypatch.setattr("fulgurite.datamodules.soft_labels.tables._LABELS_AT_ONCE", 50)
    np.testing.assert_array_equal(codec.tables(1).topic_of(labels.ids, starts), at_once)
    assert len(set(at_once.tolist())) > 3


@pytest.mark.parametrize(("steps", "bound"), [(ValueSteps(), 1e-3), (ValueSteps("log", 0.05), 1e-3)])
def test_rounding_costs_little_divergence(steps, bound):
    random = np.random.default_rng(0)
    p = np.sort(random.dirichlet(np.full(400, 0.05), 200), axis=1)[:, ::-1][:, :50]
    q, tail = steps.table()[steps.level(p)], np.maximum(1 - p.sum(1), 1e-7)
    rounded = np.maximum(np.rint(np.sqrt(tail) * 255) / 255, 3e-4) ** 2
    whole = q.sum(1) + rounded
    divergence = (p * np.log(np.maximum(p, 1e-12) / (q / whole[:, None]))).sum(1) + tail * np.log(tail / (rounded / whole))
    assert divergence.mean() < bound


def test_the_same_id_twice_is_refused():
    made = sequence(0)
    made.ids[:] = 7
    made.probabilities[:] = bits([0.01])
    with pytest.raises(StoreError, match="the same id twice"):
        codec_for(500).encode(made)


@pytest.mark.parametrize("steps", [("power", 0.01), ("sqrt", 0.0), ("log", 2.0), ("log", 0.05, 0.025)])
def test_steps_of_no_use_are_refused(steps):
    with pytest.raises(InputError, match=r"values='power' is unknown|value_step=|values='log' would round"):
        ValueSteps(*steps)


def test_tables_are_read_as_they_were_written(tmp_path):
    codec = codec_for(500, learnt=[sequence(seed) for seed in range(5)])
    tables = codec.tables(1)
    tables.save(tmp_path / "t")
    again = LabelTables.load(tmp_path / "t", 500, codec.shapes)
    np.testing.assert_array_equal(again.order, tables.order)
    np.testing.assert_array_equal(again.topics, tables.topics)
    assert all(np.array_equal(again.frequencies[name].table, tables.frequencies[name].table) for name in codec.shapes)
    data = bytearray((tmp_path / "t").read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), data[:9], b""):
        (tmp_path / "t").write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            LabelTables.load(tmp_path / "t", 500, codec.shapes)
    with pytest.raises(StoreError, match="cannot be read"):
        LabelTables.load(tmp_path / "none", 500, codec.shapes)


def header(**changes):
    fields = {"teacher": "a teacher", "teacher_fingerprint": "t" * 32, "tokenizer_fingerprint": "k" * 32, "vocabulary": 500}
    return StoreHeader(**{**fields, "settings": LabelSettings(k=12), "weights": "float32", **changes})


def keyed(seeds, length=200):
    parts = [sequence(seed, length) for seed in seeds]
    return [(header().key(part.tokens, part.starts, part.supervised), part) for part in parts]


def test_a_writer_learns_as_it_writes_and_goes_on_where_it_stopped(tmp_path):
    made = keyed(range(120))
    for start in range(0, 120, 20):  # opened six times, as by runs that were stopped
        appender = SoftLabelAppender(tmp_path / "s", header())
        for part in made[start : start + 20]:
            appender.append([part])
        appender.close()
    assert [tables_path(tmp_path / "s", 0, number).is_file() for number in (1, 2, 3)] == [True, True, False]
    at_once = SoftLabelAppender(tmp_path / "once", header())
    at_once.append(made)
    at_once.close()
    for name in ("labels-00000-00000.flb", "tables-00000-00002.flt"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
    store = SoftLabelStore(tmp_path / "s")
    codec = store.header.make_codec(tmp_path / "s", 0)
    for key, part in made:
        assert_same_labels(codec, store.read(key), part)
    first, last = (store.example(made[number][0])["soft_labels"] for number in (0, 119))
    assert (last.probabilities.float().sum(1) <= 1.02).all()
    assert len(first) == int(made[0][1].supervised.sum())


@pytest.mark.parametrize("steps", [("log", 0.05), ("log", 0.3), ("sqrt", 0.01), ("sqrt", 0.1)])
def test_what_is_rounded_coarsely_is_no_damage(tmp_path, steps):
    made_with = header(values=steps[0], value_step=steps[1])
    appender = SoftLabelAppender(tmp_path / "s", made_with)
    appender.append([(made_with.key(part.tokens, part.starts, part.supervised), part) for _, part in keyed(range(20))])
    flat = sequence(3)
    flat.probabilities[:] = bits([1 / 48])
    flat.tail[:] = bits(1 - flat.counts / 48)
    appender.append([(made_with.key(flat.tokens, flat.starts, flat.supervised), flat)])
    appender.close()
    assert len(list(SoftLabelStore(tmp_path / "s").verify())) == 21


def test_a_table_that_is_missing_is_never_written_anew(tmp_path):
    made = keyed(range(120))
    appender = SoftLabelAppender(tmp_path / "s", header())
    appender.append(made)
    appender.close()
    tables_path(tmp_path / "s", 0, 1).rename(tmp_path / "aside")
    with pytest.raises(StoreError, match=r"tables \[2\] of process 0: one before the last is missing"):
        SoftLabelAppender(tmp_path / "s", header())
    # Not even with the journal lost are blocks cut off that only want their table.
    (tmp_path / "s" / "journal-00000.jsonl").unlink()
    size = (tmp_path / "s" / "labels-00000-00000.flb").stat().st_size
    with pytest.raises(StoreError, match="one before the last is missing"):
        SoftLabelAppender(tmp_path / "s", header())
    assert (tmp_path / "s" / "labels-00000-00000.flb").stat().st_size == size
    (tmp_path / "aside").rename(tables_path(tmp_path / "s", 0, 1))
    assert len(list(SoftLabelStore(tmp_path / "s").verify())) == 120


@pytest.mark.parametrize("name", ["probabilities", "tail", "realised"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_before_they_are_written(tmp_path, name, value):
    for codec in ("ranked-2", "plain-1"):
        appender = SoftLabelAppender(tmp_path / codec, header(codec=codec))
        ((key, part),) = keyed([1])
        getattr(part, name)[0] = bits([value])[0]
        with pytest.raises(StoreError, match=f"{name}: the teacher says"):
            appender.append([(key, part)])
        assert key not in appender
        appender.close()
        assert len(SoftLabelStore(tmp_path / codec)) == 0


def test_every_process_has_its_own_tables(tmp_path):
    for rank in range(2):
        appender = SoftLabelAppender(tmp_path / "s", header(), rank=rank)
        appender.append(keyed(range(100 * rank, 100 * rank + 30)))
        appender.close()
    store = SoftLabelStore(tmp_path / "s")
    assert len(list(store.verify())) == 60
    tables_path(tmp_path / "s", 1, 1).unlink()
    with pytest.raises(StoreError, match=r"tables-00001-00001.flt cannot be read"):
        list(SoftLabelStore(tmp_path / "s").verify())


def test_a_store_of_the_first_version_is_read_and_not_written_to(tmp_path):
    appender = SoftLabelAppender(tmp_path / "s", header(codec="plain-1"))
    appender.append(keyed([1]))
    appender.close()
    path = tmp_path / "s" / "header.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1').replace('"values": "sqrt"', '"values": "sqrt"'))
    assert len(SoftLabelStore(tmp_path / "s")) == 1
    with pytest.raises(StoreError, match="codec is plain-1 there, ranked-2 here"):
        SoftLabelAppender(tmp_path / "s", header())
