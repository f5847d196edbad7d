"""What is said of command lines that are wrong: a sentence, not pages."""

import pytest

from fulgurite.experiments.main import main


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit -c offsite/tune --model.candidates [yes,no]", "--model.candidates=True: expected str. Put quotes around yes, no"),
        (
            "fit -c offsite/tune --model.prefix.lenght 3",
            "--model.prefix (PrefixSettings) has no setting 'lenght'. Did you mean",
        ),
        ("fit -c offsite/split --model.head owners", "--model.head=owners: expected Literal['party', 'owner']."),
        (
            "fit -c fusion/compress --model.start.fild 1",
            "--model.start (LearnedFusion) has no setting 'fild'. Did you mean",
        ),
        ("fit -c fusion/compress --trainer.max_steps x", "--trainer.max_steps=x: expected int."),
        (
            "fit -c fusion/compress --trainer.max_stepps 1",
            "--trainer.max_stepps is no option. Did you mean '--trainer.max_",
        ),
        ("fit -c fusion/compress --model Fussion", "--model=Fussion: no such class. Did you mean 'FusionCompression'"),
        (
            'fit -c multitask/train --data.tasks {"mine":{"class_path":"ClasificationTask"}}',
            "=ClasificationTask: no such class. Did you mean 'ClassificationTask'",
        ),
        ("generate --modl x", "--modl is no option. Did you mean '--model'"),
        ("generate", "the following arguments are required: model, prompt"),
        ("owner serv", "invalid choice: 'serv'"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(words, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.splitlines()) == 2
    assert said.splitlines()[1].startswith("All options: fulgurite ")
