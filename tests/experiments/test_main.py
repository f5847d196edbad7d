import subprocess
import sys
import time

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fulgurite import __version__
from fulgurite.errors import InputError
from fulgurite.experiments.configs import packaged_configs, resolve_config, summary
from fulgurite.experiments.main import COMMANDS, main


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["configs"]])
def test_small_questions_import_nothing_heavy(words):
    code = (
        "import sys; from fulgurite.experiments.main import main; "
        f"main({words!r}); sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - begin < 5  # a second on an idle machine
    expected = __version__ if words == ["--version"] else "distillation/student" if words == ["configs"] else "usage: fulgurite"
    assert expected in done.stdout


def test_help_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["tarin"])
    assert caught.value.code == 2
    assert "'tarin' is no command. Legal: fit, validate" in capsys.readouterr().err


def test_stopped_by_a_signal_it_does_not_say_that_all_went_well(monkeypatch):
    def stopped(words):
        raise SIGTERMException

    monkeypatch.setattr("fulgurite.experiments.main._dispatch", stopped)
    with pytest.raises(SystemExit) as caught:
        main(["fit"])
    assert caught.value.code == 143


def test_every_packaged_config_has_a_comment_line():
    configs = packaged_configs()
    assert {"distillation/capture", "distillation/student", "distillation/online"} <= configs.keys()
    assert all(len(summary(path)) > 20 for path in configs.values())


def test_unknown_config_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'distillation/student'"):
        resolve_config("distilation/student")


def test_config_is_copied_and_nothing_overwritten(tmp_path, capsys):
    main(["configs", "--copy", "distillation/student", str(tmp_path / "mine")])
    copied = tmp_path / "mine" / "student.yaml"
    assert copied.read_text() == packaged_configs()["distillation/student"].read_text()
    copied.write_text("changed")
    with pytest.raises(SystemExit):
        main(["configs", "--copy", "distillation/student", str(tmp_path / "mine")])
    assert "left as it is" in capsys.readouterr().err
    assert copied.read_text() == "changed"
    assert resolve_config(str(copied)) == str(copied)
