import os

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.runs import new_run_name, resolve_last, setting


@pytest.fixture
def runs(tmp_path):
    """Two runs, the older of which has the newer checkpoint, and one without any."""
    for number, (name, files) in enumerate({"a": ["epoch=0.ckpt", "last.ckpt"], "b": ["last.ckpt"], "c": []}.items()):
        (tmp_path / "kind" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "kind" / name / "config.yaml").write_text("experiment: kind\n")
        for step, file in enumerate(files):
            path = tmp_path / "kind" / name / "checkpoints" / file
            path.write_text("")
            os.utime(path, (1000 + 10 * step - number, 1000 + 10 * step - number))
    return tmp_path


def words(runs, *more):
    return ["fit", "--runs_folder", str(runs), "--experiment", "kind", *more]


def test_newest_checkpoint_of_the_experiment(runs):
    resolved = resolve_last(words(runs, "--ckpt_path", "last"))
    assert resolved[resolved.index("--ckpt_path") + 1] == str(runs / "kind" / "a" / "checkpoints" / "last.ckpt")
    assert resolved[resolved.index("--run") + 1] == "a"
    assert resolved[1:3] == ["-c", str(runs / "kind" / "a" / "config.yaml")]


def test_named_run(runs):
    resolved = resolve_last(words(runs, "--ckpt_path=last", "--run", "b", "-c", str(runs / "kind" / "b" / "config.yaml")))
    assert f"--ckpt_path={runs / 'kind' / 'b' / 'checkpoints' / 'last.ckpt'}" in resolved
    assert resolved.count("-c") == 1


def test_experiment_of_the_config(runs):
    config = runs / "own.yaml"
    config.write_text("experiment: kind\n")
    resolved = resolve_last(["fit", "-c", str(config), f"--runs_folder={runs}", "--ckpt_path", "last"])
    assert "a" in resolved
    assert setting(["fit", "-c", str(config), "--experiment=other"], "experiment") == "other"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run", "c"], "no checkpoint in .*kind/c"),
        (["--run", "d"], "'d' is no run of .*Legal: a, b, c"),
        (["--experiment", "new"], "no checkpoint in"),
    ],
)
def test_without_a_checkpoint_it_is_an_error(runs, more, message):
    with pytest.raises(InputError, match=message):
        resolve_last(words(runs, "--ckpt_path", "last", *more))


def test_runs_that_begin_in_the_same_second_have_names_of_their_own(tmp_path):
    names = [new_run_name(tmp_path / "kind") for _ in range(2)]
    assert names[0] < names[1]


def test_other_command_lines_are_left_alone(runs):
    assert resolve_last(["fit", "--run", "x"]) == ["fit", "--run", "x"]
