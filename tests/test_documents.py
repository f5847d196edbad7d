"""What the documents show, done."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from fulgurite.experiments.cli import run
from fulgurite.experiments.main import main

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def new_method(tmp_path, monkeypatch):
    """The files of the page about a new method, in the folder where its commands are typed."""
    text = (DOCS / "new-method.md").read_text("utf-8")
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "yaml", "yaml"]
    for name, (_, content) in zip(("focal.py", "focal.yaml", "focal-benchmark.yaml"), blocks):
        assert f"`{name}`" in text
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield re.findall(r"^PYTHONPATH=\. fulgurite (.+)$", text, re.MULTILINE)
    sys.modules.pop("focal", None)


def test_the_new_method_trains_and_says_what_is_wrong(new_method, text_file):
    from fulgurite.errors import InputError

    words = [*new_method[0].split(), "--model.source=random:tiny", "--trainer.max_steps=2", "--data.val_tokens=1024"]
    words += [f"--data.train={text_file}"]  # the embedded text takes a minute to collect
    cli = run([*words, "--trainer.precision=32", "--trainer.enable_progress_bar=false"])
    assert type(cli.model).__name__ == "FocalLanguageModel"
    assert Path("runs/focal/first/export/model.safetensors").is_file()
    with pytest.raises(InputError, match="gamma=-1.0 is below 0"):
        run([*words, "--model.gamma=-1", "--run=second"])


@pytest.mark.slow
def test_the_worked_example_gives_a_table(new_method, capsys):
    benchmark, report = (command.split() for command in new_method[1:])
    main([*benchmark, "--seeds=0"])
    main([*report, "--mixed=true"])
    table = capsys.readouterr().out
    assert re.search(r"\| cross-entropy \| \d\.\d+ \|", table)
    assert re.search(r"\| focal loss \| \d\.\d+ \|", table)


@pytest.mark.slow
def test_the_site_is_built_and_a_broken_link_is_an_error(tmp_path):
    pytest.importorskip("sphinx")
    from sphinx.cmd.build import build_main

    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    words = ["-W", "--keep-going", "-q", str(tmp_path / "docs"), str(tmp_path / "site")]
    assert build_main(words) == 0
    assert "FusionCompression" in (tmp_path / "site/api/modules.html").read_text("utf-8")
    with open(tmp_path / "docs/spans.md", "a") as file:
        file.write("\n[nowhere](nowhere.md)\n")
    assert build_main(words) != 0
