import json

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.evaluation.candidates import score_candidates
from fulgurite.experiments.evaluation.evaluate import evaluate, local_tasks
from fulgurite.experiments.main import main
from fulgurite.modules.pretrained import load_model, load_tokenizer

QUESTIONS = [
    {"query": "The man turned on the faucet, therefore", "choices": ["the toilet filled.", "water flowed out of it."], "gold": 1},
    {"query": "The sand was hit by lightning, so", "choices": ["it melted", "it sang a song"], "gold": 0},
    {"query": "Glass is", "choices": ["hard", "soft", "a kind of bird"], "gold": 0},
    {"query": "Café crème:", "choices": ["à la carte", "naïve"], "gold": 1},
]


@pytest.fixture
def examples(tmp_path):
    """A folder of examples for three kinds of task."""
    rows = {
        "copa": QUESTIONS,
        "lambada_openai": [{"context": "sand and", "continuation": "glass"}, {"context": "the strike", "continuation": "went"}],
        "triviaqa_sm_sub": [{"context": "Question: What?\nAnswer:", "answer": "Onion", "aliases": ["Onion", "Onions"]}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path)


def test_candidates_score_as_the_harness_does(examples):
    """Its accuracies, and its log-likelihoods request by request."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model("random:tiny"), load_tokenizer("random:tiny")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    plain = normed = 0
    for question in QUESTIONS:
        scores = score_candidates(model, tokenizer, question["query"], question["choices"])
        asked = [
            Instance("loglikelihood", question, (question["query"], " " + choice), number)
            for number, choice in enumerate(question["choices"])
        ]
        assert [score.log_likelihood for score in scores] == pytest.approx(
            [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)], abs=1e-3
        )
        gold = scores[question["gold"]]
        plain += gold is max(scores, key=lambda score: score.log_likelihood)
        normed += gold is max(scores, key=lambda score: score.per_character)
    found = evaluate("random:tiny", "copa", data=examples, weights="float32")
    assert found["copa.acc"] == plain / len(QUESTIONS)
    assert found["copa.acc_norm"] == normed / len(QUESTIONS)


def test_every_kind_of_local_task_gives_a_figure(examples, tmp_path, capsys):
    output = tmp_path / "out" / "figures.json"
    words = ["evaluate", "--model=random:tiny", "--tasks=lambada_openai,triviaqa_sm_sub", f"--data={examples}"]
    main([*words, "--limit=1", f"--output={output}"])
    text = capsys.readouterr().out
    assert "lambada_openai" in text
    assert "perplexity" in text
    block = json.loads(output.read_text())
    assert block["run"]["limit"] == 1
    assert block["run"]["fingerprint"]
    assert 0 <= block["metrics"]["lambada_openai.acc"] <= 1
    assert any(name.startswith("triviaqa_sm_sub.exact_match") for name in block["metrics"])
    with pytest.raises(SystemExit):
        main([*words, f"--output={output}"])
    assert "exists and is left as it is" in capsys.readouterr().err


def test_every_local_task_says_what_it_is():
    assert {"lambada_openai", "copa", "boolq", "commonsense_qa", "svamp", "triviaqa_sm_sub"} <= local_tasks().keys()
    for path in local_tasks().values():
        assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ""}, "names none"),
        ({"tasks": "copa", "limit": 0}, "limit=0"),
        ({"tasks": "boolq"}, "'boolq' needs .*boolq.jsonl"),
        ({"tasks": "humaneval"}, "--execute true go together"),
        ({"tasks": "humaneval", "execute": True}, "needs HumanEval.jsonl"),
        ({"tasks": "no_such_task"}, "could not run .*no_such_task"),
    ],
)
def test_bad_input_is_refused_by_name(examples, settings, message):
    with pytest.raises(InputError, match=message):
        evaluate("random:tiny", settings.pop("tasks"), data=examples, **settings)


def test_humaneval_runs_the_tests_of_each_problem(tmp_path, monkeypatch):
    from fulgurite.experiments.evaluation import humaneval

    problems = [
        {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"},
        {"prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2", "entry_point": "two"},
    ]
    (tmp_path / "HumanEval.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    monkeypatch.setattr(humaneval, "continue_text", lambda *rest, **more: "    return 1")
    assert evaluate("random:tiny", "humaneval", data=str(tmp_path), execute=True) == {"humaneval.pass_at_1": 0.5}
