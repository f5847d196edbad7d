import builtins
import importlib.util
import json

import pytest

from fulgurite.datamodules import documents
from fulgurite.datamodules.documents import DataError, check_documents, documents_hash, read_documents
from fulgurite.datamodules.python_docs import python_docs


def test_text_jsonl_parquet_and_folders_give_the_same_documents(tmp_path):
    texts = ["Sand melts.", "Glass stays.\nTwo lines."]
    (tmp_path / "a").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "a" / f"{number}.txt").write_text(text)
    (tmp_path / "a" / "picture.png").write_bytes(b"no text")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "  "]))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    for source in ("a", "b.jsonl", "c.parquet"):
        check_documents(str(tmp_path / source), "train")
        assert list(read_documents(str(tmp_path / source))) == texts
    assert documents_hash(str(tmp_path / "a"), "text") == documents_hash(str(tmp_path / "b.jsonl"), "text")


@pytest.mark.parametrize(
    ("source", "message"),
    [("package:python-doc", "Did you mean 'package:python-docs'"), ("missing.txt", "train='missing.txt'")],
)
def test_unknown_sources_are_refused_by_name(source, message):
    with pytest.raises(DataError, match=message):
        check_documents(source, "train")


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.txt, \.md, \.rst, \.jsonl, \.parquet"):
        check_documents(str(tmp_path / "model.bin"), "train")


def test_missing_optional_package_gives_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'fulgurite\[data\]'"):
        check_documents("hub:owner/name", "train")
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="needs the package pyarrow"):
        check_documents(str(tmp_path / "rows.parquet"), "train")


def test_unreachable_hub_says_what_to_do():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"hub:owner/no-such-set.*local \.jsonl"):
        list(read_documents("hub:owner/no-such-set"))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:test[:9]", ("owner/name", None, "test[:9]")),
        ("hub:owner/name/main:test", ("owner/name", "main", "test")),
        ("hub:gsm8k", ("gsm8k", None, "train")),
    ],
)
def test_a_hub_set_has_a_name_a_config_and_a_split(source, asked, monkeypatch):
    datasets, found = pytest.importorskip("datasets"), []

    def load(name, config, split):
        found.append((name, config, split))
        return [{"text": "sand"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents(source)) == ["sand"]
    assert found == [asked]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tekst": "a"}', r"row 1.*text_field='text'.*Did you mean 'tekst'"),
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: a list"),
        (r'{"text": "bad \uD83D tail"}', r"line 1: \\ud83d is half of a surrogate pair"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents(str(path)))


def test_python_docs_are_collected_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))
    package = tmp_path / "library"
    package.mkdir()
    long = "Return the sum of two numbers, which may be of any kind that has an addition. " * 4 + "End."
    (package / "code.py").write_text(f'def add(a, b):\n    """{long}"""\n\n\ndef short():\n    """Too short."""\n')
    inner = f"Within. {long}"
    (package / "blocks.py").write_text(f'''
try:
    pick = lambda body: body if body else []
except ValueError:
    with open(body) as file:
        class Inner:
            async def read(self):
                "{inner}"
''')
    (package / "broken.py").write_text("def (:\n")
    monkeypatch.setattr("fulgurite.datamodules.python_docs._roots", lambda: {"python": [package]})
    found = list(python_docs())
    assert {long, inner} <= set(found)
    assert "Too short." not in found
    assert any("assert" in text for text in found)  # Python's reference
    assert found == sorted(found)
    monkeypatch.setattr(builtins, "compile", None)  # parsing again would fail
    assert list(python_docs()) == found
    assert documents.documents_hash("package:python-docs", "text")
