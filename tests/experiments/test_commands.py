import json
import subprocess
import sys

import pytest

from fulgurite.experiments import report
from fulgurite.experiments.main import COMMANDS, main
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer


def fulgurite(*words):
    code = "from fulgurite.experiments.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_generate_streams_a_text(model, capsys):
    main(["generate", "--model", model, "--prompt", "sand", "--max_new_tokens", "8"])
    once = capsys.readouterr().out
    main(["generate", "--model", model, "--prompt", "sand", "--max_new_tokens", "8", "--chat", "true"])
    assert capsys.readouterr().out
    drawn = []
    for seed in ("1", "1", "2"):
        main(["generate", "--model", model, "--prompt", "sand", "--temperature", "2", "--seed", seed])
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]
    assert once


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "random:tyni", "--prompt", "a"], "random:tiny"),
        (["--model", "random:tiny", "--prompt", ""], "prompt is empty"),
        (["--model", "random:tiny", "--prompt", "a", "--top_p", "2"], "top_p=2"),
    ],
)
def test_bad_input_gives_one_clear_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_labels_stats_and_verify(tmp_path, capsys):
    from ..datamodules.soft_labels.test_store import write

    store = write(tmp_path / "store", range(3))
    main(["labels", "stats", str(store.folder)])
    assert json.loads(capsys.readouterr().out)["sequences"] == 3
    main(["labels", "verify", str(store.folder)])
    assert "3 sequences, all whole" in capsys.readouterr().out
    shard = store.folder / "labels-00000-00000.flb"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        main(["labels", "verify", str(store.folder)])
    assert caught.value.code == 2
    assert "checksum does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "configs"])
def test_every_command_has_a_help(command):
    done = fulgurite(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.slow
def test_shell_completion_knows_commands_and_options():
    done = fulgurite("--print_completion", "shtab-bash")
    assert done.returncode == 0, done.stderr
    for word in ("fit", "generate", "--ckpt_path", "--model"):
        assert word in done.stdout


def result(row, seed, loss, **environment):
    return {
        "row": row,
        "seed": seed,
        "note": "A note.",
        "figures": {"loss": loss},
        "environment": {"cpu": "x", "threads": 2, "gpus": [], "commit": "c" * 40, **environment},
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "method" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def save(*entries):
        for number, entry in enumerate(entries):
            (folder / f"bench-{number}.json").write_text(json.dumps(entry))

    return save


def test_report_gives_mean_and_spread(results):
    results(result("a", 0, 1.0), result("a", 1, 2.0), result("b", 0, 30.0))
    text = report.table("method/bench")
    assert "| a | 1.500 ± 0.707 |" in text
    assert "| b | 30.0 |" in text
    assert "A note. Measured on x, 2 threads; commit cccccccccc." in text


def test_report_never_mixes_commits_or_machines(results):
    results(result("a", 0, 1.0), result("a", 1, 2.0, commit="d" * 40))
    with pytest.raises(ValueError, match="mixes several commit"):
        report.table("method/bench")
    results(result("a", 0, 1.0), result("a", 1, 2.0, cpu="y"))
    with pytest.raises(ValueError, match="mixes several cpu"):
        report.table("method/bench")


def test_report_of_an_unknown_name(results):
    results(result("a", 0, 1.0))
    with pytest.raises(ValueError, match="Did you mean 'method/bench'"):
        report.table("method/bensh")


def test_documents_are_up_to_date():
    documents = report.documents()
    assert documents, "README.md holds no generated table"
    for path in documents:
        assert report.fill(path.read_text("utf-8")) == path.read_text("utf-8"), f"run `fulgurite report --write`: {path}"
