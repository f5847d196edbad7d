import json

import pytest
from transformers import AutoModelForCausalLM

from fulgurite.experiments.main import main


def test_demo_of_the_tiny_model(tmp_path, monkeypatch, capsys, text_file):
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--source=random:tiny", f"--text={text_file}", "--layers=2", "--train_tokens=1280", "--val_tokens=320"]
    main([*words, "--block_size=64"])
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["figures"].keys() == {"teacher", "hard", "half"}
    assert summary["figures"]["teacher"]["kl"] < 0.01 < summary["figures"]["half"]["kl"]
    assert summary["labels"]["labelled_tokens"] == 20 * 63
    assert summary["labels"]["capture_tokens_per_second"] > 0
    assert AutoModelForCausalLM.from_pretrained("runs/demo/export").config.num_hidden_layers == 2
    assert "runs/demo/export" in capsys.readouterr().out

    main([*words, "--block_size=64"])  # nothing is captured or trained again
    again = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert again["figures"] == summary["figures"]
    assert again["train_seconds"] == summary["train_seconds"]
    with pytest.raises(SystemExit):
        main([*words, "--block_size=32"])
    assert "holds a demo with other settings (block_size was 64 and is 32)" in capsys.readouterr().err
