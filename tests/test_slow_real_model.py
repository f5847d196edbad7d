"""The embedded model and the documented commands, as a user types them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.pretrained import load_model, load_tokenizer, resolve_source
from fulgurite.modules.tokens import needs_bos, token_byte_lengths

ROOT = Path(__file__).resolve().parent.parent
SMOLLM = "package:smollm2-135m-instruct"


def installed(source):
    try:
        resolve_source(source)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_real_model_is_dequantised_and_speaks():
    installed(SMOLLM)
    tokenizer, model = load_tokenizer(SMOLLM), load_model(SMOLLM, "bfloat16")
    assert resolve_source(SMOLLM).title == "SmolLM2-135M-Instruct (Q4_1, de-quantised)"
    assert (model.config.num_hidden_layers, len(tokenizer)) == (30, 49152)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template
    text = "The capital of France is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
    assert int(token_byte_lengths(tokenizer)[ids[0]].sum()) == len(text)


@pytest.mark.slow
def test_real_model_gemma_needs_bos_and_has_no_chat_template(tmp_path):
    installed("package:gemma-3-270m")
    from fulgurite.datamodules import InstructionDataModule

    tokenizer = load_tokenizer("package:gemma-3-270m")
    assert needs_bos(tokenizer)
    text = "Sand ü melts into glass."
    ids = tokenizer(text).input_ids
    assert int(token_byte_lengths(tokenizer)[torch.tensor(ids)].sum()) == len(text.encode())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(InputError, match="no chat template"):
        InstructionDataModule(str(rows), tokenizer="package:gemma-3-270m").setup()


README = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
(SHELL,) = (block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if ".venv/bin/fulgurite" in block)
SHORT = {
    "predict": ["--data.block_size=64", "--data.train_tokens=256"],
    "fit": ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"],
    "spans/compress": [
        *("--data.lengths=[512]", "--data.val_lengths=[640]", "--data.examples=1", "--data.val_examples=1"),
        "--data.answer_tokens=4",
    ],
    "demo": ["--train_tokens=1024", "--val_tokens=256", "--block_size=128"],
    "generate": ["--max_new_tokens=3"],
}


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def type_commands(commands, folder):
    """Run commands of the README but those of ``pip``, shortened by options only."""
    (folder / "my_text").mkdir()
    (folder / "my_text" / "a.txt").write_text("Sand melts where the lightning goes down. " * 600)
    for line in (line for line in commands.splitlines() if "fulgurite" in line):
        command = line.split("#")[0].replace(".venv/bin/", "")
        words = command.split()
        config = words[words.index("-c") + 1] if "-c" in words else ""
        run(" ".join([command, *(SHORT.get(config) or SHORT.get(words[1], []))]), folder)


@pytest.mark.slow
def test_real_model_commands_of_the_readme(tmp_path):
    """Its first commands, after the one that ``make demo`` runs."""
    installed(SMOLLM)
    type_commands("fulgurite demo\n" + SHELL.split("\n\n")[0], tmp_path)
    assert (tmp_path / "runs" / "demo" / "summary.json").is_file()
    (tmp_path / "block.py").write_text(
        "import sys; sys.modules['fulgurite'] = None\n"
        "from transformers import pipeline; print(pipeline('text-generation', 'runs/demo/export')('def read_file(')[0])"
    )
    assert "generated_text" in run(f"{sys.executable} block.py", tmp_path)


@pytest.mark.slow
def test_real_model_further_commands_of_the_readme(tmp_path):
    """The commands that need nothing of the first, and the code."""
    installed(SMOLLM)
    further = SHELL.split("\n\n")[1:]
    assert further
    type_commands("\n".join(further), tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    # The first block needs the demo's full length to be worth reading; the other test runs it.
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1:]:
        (tmp_path / "block.py").write_text(block)  # a file, which a second rank can start too
        run(f"{sys.executable} block.py", tmp_path)
