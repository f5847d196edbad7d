import json
import subprocess
import sys

import pytest

from fulgurite.experiments.main import COMMANDS, main
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer


def fulgurite(*words):
    code = "from fulgurite.experiments.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


def test_labels_stats_and_verify(tmp_path, capsys):
    from ..datamodules.soft_labels.test_store import write

    store = write(tmp_path / "store", range(3))
    main(["labels", "stats", str(store.folder)])
    assert json.loads(capsys.readouterr().out)["sequences"] == 3
    main(["labels", "verify", str(store.folder)])
    assert "3 sequences, all whole" in capsys.readouterr().out
    main(["labels", "stats", str(store.folder), "--picture", str(tmp_path / "stats.png")])
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["labels", "stats", str(store.folder), "--picture", "stats.svg"])
    assert "picture='stats.svg' is no PNG file" in capsys.readouterr().err
    shard = store.folder / "labels-00000-00000.flb"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        main(["labels", "verify", str(store.folder)])
    assert caught.value.code == 2
    assert "checksum does not fit" in capsys.readouterr().err


def test_labels_go_to_parquet_and_come_back(capsys, tmp_path):
    from ..datamodules.soft_labels.test_aligned import TOKENIZERS, store_of

    store, _ = store_of(tmp_path / "store", "large", ["the sand was grün"])
    file, again = str(tmp_path / "labels.parquet"), str(tmp_path / "again")
    main(["labels", "export", str(store.folder), file])
    assert "labels.parquet: 1 sequences" in capsys.readouterr().out
    TOKENIZERS["large"].save_pretrained(tmp_path / "teacher")
    tiny_model().save_pretrained(tmp_path / "teacher")
    main(["labels", "import", "--file", file, "--store", again, "--teacher", "it", "--tokenizer", str(tmp_path / "teacher")])
    assert "again: 1 sequences" in capsys.readouterr().out


def test_labels_align_shows_what_two_vocabularies_share(capsys, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["sand and"])
    model = tiny_model()
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    main(["labels", "align", "--teacher-tokenizer", str(tmp_path), "--student_tokenizer", "random:tiny"])
    found = json.loads(capsys.readouterr().out)
    assert (found["teacher_tokens"], found["student_tokens"]) == (260, 259)
    assert found["exact"] == pytest.approx(257 / 260)  # the end of a text too
    assert found["none"] == pytest.approx(2 / 260)
    assert found["examples"] == {"sand and": "s"}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "configs"])
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code in (0, None)
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.slow
def test_shell_completion_knows_commands_and_options():
    done = fulgurite("--print_completion", "shtab-bash")
    assert done.returncode == 0, done.stderr
    for word in ("fit", "generate", "--ckpt_path", "--model"):
        assert word in done.stdout
