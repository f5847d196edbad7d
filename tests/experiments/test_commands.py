import json
import subprocess
import sys

import pytest

from fulgurite.experiments.main import COMMANDS, main


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
