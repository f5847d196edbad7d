from pathlib import Path

import pytest

from fulgurite.experiments.evaluation.code_execution import Limits, run_code
from fulgurite.experiments.evaluation.templates import TEMPLATES, template
from fulgurite.experiments.main import main
from fulgurite.modules.offsite import EmulatorManifest, ModelPart, Prefix, PrefixSettings
from fulgurite.modules.offsite.certificates import make_certificates
from fulgurite.modules.offsite.owner import OwnerLayers
from fulgurite.modules.offsite.server import OwnerServer
from fulgurite.modules.pretrained import model_fingerprint
from fulgurite.modules.span_attention import SpanPlan, SpanRule, runtime
from fulgurite.modules.student import keep_layers
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model(tmp_path):
    """An exported folder."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_text_is_streamed(model, capsys):
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


def test_spans_of_a_folder_are_used_and_said(model, monkeypatch, caplog):
    words = ["generate", "--model", model, "--prompt", "sand and glass and lightning", "--max_new_tokens", "16"]
    words += ["--weights", "float32"]
    made = []
    monkeypatch.setattr(runtime, "SpanCache", lambda *args, make=runtime.SpanCache: made.append(make(*args)) or made[-1])
    main(words)
    assert not made
    SpanPlan.same(SpanRule(3), tiny_model().config, sink=1).save(Path(model))
    main(words)
    assert "Attention spans of the model's folder: 0 % of the cache at 4096 tokens" in caplog.text
    assert made[0].nbytes() == 4 * 2 * 2 * 4 * 8 * 4, "layers, keys and values, heads, slots, size, bytes of float32"


def test_code_keeps_the_function_and_is_run_on_the_flag_alone(model, capsys, monkeypatch):
    from fulgurite.experiments.evaluation import generate

    words = ["generate", "--model", model, "--task", "code", "--prompt", "def one():\n", "--max_new_tokens", "8"]
    main(words)
    assert capsys.readouterr().out.startswith("def one():\n")
    monkeypatch.setattr(generate, "continue_text", lambda *rest, ends, **more: "    return 1")
    main([*words, "--tests", "assert one() == 1", "--execute", "true"])
    assert "tests passed" in capsys.readouterr().out
    main([*words, "--tests", "assert one() == 2", "--execute", "true"])
    assert "tests failed: AssertionError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--tests", "assert one() == 1"])
    assert "only run on the explicit flag" in capsys.readouterr().err


def test_writing_ends_at_the_templates_ends(model, capsys):
    """The tiny model writes bytes; whichever comes first in its answer can be made the end."""
    from fulgurite.experiments.evaluation.generate import continue_text
    from fulgurite.modules.language_model import GenerationSettings
    from fulgurite.modules.pretrained import load_model, load_tokenizer

    loaded, tokenizer = load_model(model), load_tokenizer(model)
    whole = continue_text(loaded, tokenizer, "sand", GenerationSettings(max_new_tokens=12))
    end = whole[4]
    cut = continue_text(loaded, tokenizer, "sand", GenerationSettings(max_new_tokens=12), ends=(end,))
    assert cut == whole[: whole.index(end)]


def test_translation_is_asked_for_by_language(model, capsys):
    asked = template("translation").fill("Sand is hot.", "English", "German")
    assert asked == "English: Sand is hot.\nGerman:"
    main(["generate", "--model", model, "--task", "translation", "--prompt", "Sand", "--max_new_tokens", "4"])
    assert capsys.readouterr().out.count("\n") == 1


def test_classification_chooses_a_candidate(model, capsys):
    main(["generate", "--model", model, "--task", "classification", "--prompt", "Sand is", "--candidates", "[hot,cold]"])
    text = capsys.readouterr().out
    assert text.count("chosen") == 1
    assert "hot" in text
    assert "cold" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "random:tyni", "--prompt", "a"], "random:tiny"),
        (["--model", "random:tiny", "--prompt", ""], "prompt is empty"),
        (["--model", "random:tiny", "--prompt", "a", "--top_p", "2"], "top_p=2"),
        (["--model", "random:tiny", "--prompt", "a", "--task", "poem"], "poem"),
        (["--model", "random:tiny", "--prompt", "a", "--task", "classification"], "needs --candidates"),
        (["--model", "random:tiny", "--prompt", "a", "--candidates", "[a,b]"], "--candidates is for --task classification"),
        (
            ["--model", "random:tiny", "--prompt", "a", "--task", "classification", "--candidates", "[a,a]"],
            "at least two different",
        ),
        (["--model", "random:tiny", "--prompt", "", "--task", "classification", "--candidates", "[a,b]"], "prompt is empty"),
        (["--model", "random:tiny", "--prompt", "a", "--execute", "true"], "--execute is for --task code"),
    ],
)
def test_bad_input_gives_one_clear_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_templates_cover_the_four_uses():
    assert TEMPLATES.keys() == {"text", "code", "translation", "classification"}
    with pytest.raises(ValueError, match="Legal: text, code"):
        template("poem")
    assert template("text").fill("a {target} b") == "a {target} b"


def test_generated_code_runs_within_limits(tmp_path):
    assert run_code("print('well')") == (True, "well")
    assert run_code("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    good, message = run_code("while True: pass", Limits(seconds=1))
    assert not good
    assert "signal" in message or "seconds" in message
    good, message = run_code("x = bytearray(10**9)", Limits(memory_bytes=1 << 28))
    assert (good, message) == (False, "MemoryError")
    good, _ = run_code("open('big', 'wb').write(bytes(10**7))")
    assert not good
    assert run_code("exit()\nassert 1 == 2") == (False, "it exits before its end")
    assert run_code("import os\nos._exit(0)") == (False, "it exits before its end")
    assert run_code("while True: print('x' * 1000)")[0] is False  # its output is a file with a limit
    good, message = run_code("import os; print(sorted(os.environ), os.listdir())")
    assert good
    assert "HOME" not in message


@pytest.fixture
def split(tmp_path):
    """An emulator's folder, a prefix for its owner's model, and words that reach the owner."""
    whole = tiny_model()
    fingerprint = model_fingerprint(whole)
    prefix = Prefix.random(whole, PrefixSettings(length=3))
    prefix.save(tmp_path / "prefix", fingerprint)
    emulator = tiny_model()
    keep_layers(emulator, [0, 1])
    emulator.save_pretrained(tmp_path / "emulator")
    tiny_tokenizer().save_pretrained(tmp_path / "emulator")
    EmulatorManifest(fingerprint, 4, (0, 1), 1, "tiny", None, {}).save(tmp_path / "emulator")
    make_certificates(tmp_path / "papers", hosts=["localhost"], parties=["one"])
    token = tmp_path / "papers" / "one.token"
    server = OwnerServer(
        OwnerLayers(ModelPart(whole.bfloat16(), 1, 4)),
        model=fingerprint,
        tokens={"one": token.read_text().strip()},
        certificate=tmp_path / "papers" / "owner.crt",
        key=tmp_path / "papers" / "owner.key",
    ).start()
    reach = [f"--split=localhost:{server.port}", f"--token={token}", f"--certificate={tmp_path / 'papers' / 'owner.crt'}"]
    yield ["--model", str(tmp_path / "emulator"), *reach], ["--prefix", str(tmp_path / "prefix")]
    server.stop(0)


@pytest.mark.parametrize("head", ["party", "owner"])
def test_text_through_a_split_is_that_of_the_whole_model(model, split, head, capsys):
    through, prefix = split
    written = []
    for words in ([*through, "--head", head, *prefix], ["--model", model, *prefix], ["--model", model]):
        main(["generate", *words, "--prompt", "sand and", "--max_new_tokens", "12"])
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]
    main(["generate", *through, *prefix, "--prompt", "sand", "--temperature", "1", "--head", head])
    assert capsys.readouterr().out


def test_words_that_contradict_each_other_are_refused(model, split, capsys):
    through, prefix = split
    for words, message in (
        ([*through[:3]], "--split needs --token and --certificate"),
        (["--model", model, "--head", "owner"], "are for --split"),
        (["--model", model, *prefix, "--task", "classification", "--candidates", "[a,b]"], "cannot be scored with --prefix"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", *words, "--prompt", "sand"])
        assert message in capsys.readouterr().err
