import re

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.benchmarks.fingerprints import content_hash
from fulgurite.experiments.benchmarks.plan import available, in_order, load_benchmark


def test_products_come_before_the_cells_that_need_them(bench):
    jobs = bench().jobs()
    assert [job.name for job in jobs] == ["tuned", "slow-0", "slow-1", "fast-0"]
    assert [job.name for job in in_order(jobs)] == ["tuned", "slow-0", "slow-1", "fast-0"]
    slow, fast = jobs[1], jobs[3]
    assert slow.needs == ["tuned"]
    words = fast.steps[0].words()
    assert words[:3] == ["fit", "-c", "language_model/finetune"]
    assert "--model.source={tuned}" in words
    assert "--model.optimizer.init_args.lr=0.01" in words
    assert "--seed_everything=0" in words
    assert "--data.train_tokens=1280" in words
    assert "--data.train={data}/text.txt" in words
    assert fast.steps[1].metrics == {"loss": "val_loss"}


def test_seeds_and_patterns_choose_cells(bench):
    plan = bench()
    assert [job.name for job in plan.jobs([5])] == ["tuned", "slow-5", "fast-5"]
    assert [job.name for job in plan.jobs(only=["s*"])] == ["tuned", "slow-0", "slow-1"]
    assert [job.name for job in plan.jobs(only=["fast", "slow-1"])] == ["tuned", "slow-1", "fast-0"]
    with pytest.raises(InputError, match="--only 'fsat' matches no variant or cell.*Did you mean 'fast'"):
        plan.jobs(only=["fsat"])


def test_fingerprint_follows_commands_configs_and_data(bench, text_file):
    before = {job.name: job.fingerprint for job in bench().jobs()}
    assert before == {job.name: job.fingerprint for job in bench().jobs()}
    changed = bench(lambda spec: spec["variants"]["fast"]["set"].update({"model.optimizer.init_args.lr": 0.02})).jobs()
    assert [job.name for job in changed if job.fingerprint != before[job.name]] == ["fast-0"]
    named = bench(lambda spec: spec["variants"]["fast"].update(title="other", group="g")).jobs()
    assert {job.name: job.fingerprint for job in named} == before
    product = bench(lambda spec: spec["products"]["tuned"]["set"].update({"data.block_size": 32})).jobs()
    assert all(job.fingerprint != before[job.name] for job in product)
    text_file.write_text("other words")
    content_hash.cache_clear()
    assert all(job.fingerprint != before[job.name] for job in bench().jobs())


def test_what_a_function_reads_by_itself_is_part_of_the_fingerprint(bench, tmp_path):
    def change(spec):
        spec["scales"]["cpu"]["sets"] = "{data}/sets"
        spec["products"]["tuned"]["reads"] = ["{sets}/one"]
        spec["common"]["reads"] = ["{data}/common"]
        spec["variants"]["fast"] |= {"reads": ["{data}/{which}"], "let": {"which": "own", "start": "random:tiny"}}
        spec["evaluations"]["held-out"]["reads"] = ["{data}/seen"]

    with pytest.raises(InputError, match=r"reads='.*/sets/one' of benchmark 'method' is not there\. Name.*--data\.$"):
        bench(change).jobs()
    files = {name: tmp_path / name for name in ("sets/one", "common", "own", "seen")}
    for path in files.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("some words")
    jobs = {job.name: job for job in bench(change).jobs()}
    assert jobs["fast-0"].data.keys() == {"{data}/text.txt", "{data}/own", "{data}/seen"}
    assert jobs["slow-0"].data.keys() == {"{data}/text.txt", "{data}/common", "{data}/seen", "{data}/sets/one"}
    for name, changed in {"sets/one": {"tuned", "slow-0", "slow-1"}, "common": {"slow-0", "slow-1"}, "own": {"fast-0"}}.items():
        files[name].write_text("other words")
        content_hash.cache_clear()
        again = {job.name: job for job in bench(change).jobs()}
        assert {job for job in jobs if again[job].fingerprint != jobs[job].fingerprint} == changed
        jobs = again


def test_null_leaves_out_a_common_setting(bench):
    job = bench(lambda spec: spec["variants"]["fast"].update(set={"data.train_tokens": None})).jobs(only=["fast"])[-1]
    assert not any(word.startswith("--data.train_tokens") for word in job.steps[0].words())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(sedes=[0]), "'sedes' was unexpected"),
        (lambda spec: spec.pop("title"), "'title' is a required property"),
        (lambda spec: spec["variants"]["fast"].pop("title"), "variants.fast.*'title' is a required property"),
        (lambda spec: spec["variants"]["fast"].update(command="fti"), "variants.fast.command.*'fti' is not one of"),
        (lambda spec: spec["variants"]["fast"].update(disk="lables"), "disk='lables'.* is no product"),
        (
            lambda spec: spec["variants"]["fast"].update(set={"a": "{tokns}"}),
            r"\{tokns\} stands for nothing.*Did you mean 'tokens'",
        ),
        (lambda spec: spec["variants"]["fast"].update(config="language_model/finetne"), "Did you mean 'language_model/finetune'"),
        (lambda spec: spec["variants"]["fast"].update(command="measure"), "measure takes a function"),
        (lambda spec: spec["products"]["tuned"]["set"].update({"a": "{tuned}"}), "need each other: slow-0 -> tuned"),
        (lambda spec: spec["variants"]["fast"].update(evaluations=["held-ot"]), "'held-ot' is no evaluation.*'held-out'"),
        (lambda spec: spec["variants"]["fast"].update(model="{tuned}", set={"a": 1}), "has a model.*and no set"),
        (lambda spec: spec["variants"]["slow"].update(model="{tuned}", reads=["{text}"]), "has a model.*and no reads"),
        (lambda spec: spec["variants"]["fast"].update(reads=["{tuned}/x"]), r"reads: \{tuned\} stands for nothing"),
        (
            lambda spec: spec["products"].update(
                seeded={**spec["products"]["tuned"], "seeded": True},
                tuned={**spec["products"]["tuned"], "set": {"a": "{seeded}"}},
            ),
            "products.tuned.*uses 'seeded'.*seeded: true",
        ),
    ],
)
def test_wrong_entries_are_named(bench, change, message):
    with pytest.raises(InputError, match=message):
        bench(change).jobs()


def test_unknown_names_and_missing_data_are_refused(bench, tmp_path):
    bench()
    with pytest.raises(InputError, match="'mehtod' is no benchmark.*Did you mean 'method'"):
        load_benchmark("mehtod")
    with pytest.raises(InputError, match="--scale 'gpu'.*Legal: cpu"):
        load_benchmark("method", "gpu")
    with pytest.raises(InputError, match="--set.tokns.*Did you mean 'tokens'"):
        load_benchmark("method", settings={"tokns": 1})
    with pytest.raises(InputError, match="text='.*none/text.txt'.*--data"):
        load_benchmark("method", data=str(tmp_path / "none")).jobs()
    assert load_benchmark("method", settings={"tokens": "64"}).constants["tokens"] == "64"


SETS = [f"{{data}}/{name}" for name in ("sst2", "rte", "ag_news", "banking77", "sms_spam")]
SETS += [f"{{data}}/wikitext2/{split}.raw.txt" for split in ("valid", "test")]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", available())
def test_command_lines_of_the_packaged_benchmarks_are_right(name, every, tmp_path):
    """At every scale, every step parses, or as many as have each word of each step; every benchmark has ``smoke``."""
    from fulgurite.experiments.benchmarks.check import wrong
    from fulgurite.experiments.benchmarks.plan import fill

    assert "smoke" in load_benchmark(name).spec["scales"]
    seen = set()
    for scale in load_benchmark(name).spec["scales"]:
        plan = load_benchmark(name, scale, data=str(tmp_path))
        for value in [*plan.constants.values(), *SETS]:
            if value.startswith("{data}/"):
                (tmp_path / value.removeprefix("{data}/")).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / value.removeprefix("{data}/")).touch()
        # What differs in numbers alone, or in the names of a model or text, parses alike.
        named = "|".join(re.escape(value) for value in (*plan.constants.values(), "random:tiny") if re.search("[:/]", value))
        for job in plan.jobs():
            needs = (need.partition("@")[0] for need in job.needs)
            places = {"data": str(tmp_path), "run": "run", "model": "random:tiny", **dict.fromkeys(needs, "random:tiny")}
            for step in job.steps:
                words = [fill(word, places, name) for word in step.words()]
                config = " ".join(words[:3])
                kinds = {(config, re.sub(rf"\d+|{named}", "0", word)) for word in ([" ".join(words)] if every else words[3:])}
                if not kinds <= seen:
                    seen |= kinds
                    assert not wrong(words), words
