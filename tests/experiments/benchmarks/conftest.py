import json

import pytest
import yaml

from fulgurite.experiments.benchmarks import plan

SPEC = {
    "title": "A bench",
    "note": "{tokens} tokens.",
    "equal": "tokens",
    "seeds": [0],
    "scales": {"cpu": {"text": "{data}/text.txt", "tokens": 1280, "layers": 4, "early": 3}},
    "products": {
        "tuned": {
            "command": "fit",
            "config": "language_model/finetune",
            "gives": "export",
            "set": {
                "model.source": "random:tiny",
                "data.train": "{text}",
                "data.train_tokens": "{tokens}",
                "data.block_size": 64,
                "trainer.precision": "32-true",
                "trainer.logger": False,
                "trainer.callbacks": [{"class_path": "ExportPretrained"}],
            },
        }
    },
    "common": {
        "config": "language_model/finetune",
        "metrics": {"early_loss": "train_loss@{early}"},
        "curves": ["train_loss"],
        "let": {"start": "{tuned}"},
        "set": {
            "model.source": "{start}",
            "model.optimizer.init_args.lr": 0.001,
            "data.train": "{text}",
            "data.train_tokens": "{tokens}",
            "data.block_size": 64,
            "trainer.precision": "32-true",
            "trainer.log_every_n_steps": 1,
            "trainer.callbacks": [{"class_path": "ExportPretrained"}],
        },
    },
    "variants": {
        "slow": {"title": "small rate", "seeds": [0, 1]},
        "fast": {"title": "large rate", "set": {"model.optimizer.init_args.lr": 0.01}},
    },
    "evaluations": {
        "held-out": {
            "command": "validate",
            "config": "language_model/finetune",
            "set": {
                "model.source": "{model}",
                "data.train": "{text}",
                "data.block_size": 64,
                "trainer.precision": "32-true",
                "trainer.logger": False,
                "trainer.callbacks": "null",
            },
            "metrics": {"loss": "val_loss"},
        }
    },
    "report": {
        "baseline": "slow",
        "columns": {
            "loss": {"title": "loss", "unit": "nats", "better": "lower", "relative": "difference"},
            "tokens_per_second": {"title": "speed", "unit": "tokens/s", "better": "higher", "timing": True},
        },
        "plots": {
            "curve": {"kind": "curve", "y": "train_loss"},
            "front": {"kind": "scatter", "x": "loss", "y": "tokens_per_second"},
            "bars": {"kind": "bars", "y": "loss"},
            "times": {"kind": "timeline", "panels": {"train_loss": "loss", "val_loss": "unseen"}, "only": ["slow"]},
            "marked": {"kind": "curve", "y": "train_loss", "marks": "val_loss"},
            "map": {"kind": "heatmap", "y": "found", "only": ["slow", "fast"]},
            "matrix": {"kind": "matrix", "y": "found", "only": ["slow"]},
            "lines": {"kind": "lines", "y": "found", "only": ["fast"]},
        },
    },
}


@pytest.fixture
def bench(tmp_path, monkeypatch, text_file):
    """Write a benchmark ``method`` with the changes of ``change(spec)``; its results go to a folder of the test."""
    (tmp_path / "experiments" / "method").mkdir(parents=True)
    (tmp_path / "experiments" / "method" / "__init__.py").touch()
    monkeypatch.setattr(plan, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)

    def write(change=lambda spec: None):
        spec = json.loads(json.dumps(SPEC))
        change(spec)
        (tmp_path / "experiments" / "method" / "benchmark.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        return plan.load_benchmark("method", data=str(text_file.parent))

    return write


def result(variant, seed, loss, *, speed=100.0, curve=(), **environment):
    """A result file's content."""
    return {
        "run": {
            "benchmark": "method",
            "scale": "cpu",
            "variant": variant,
            "title": variant,
            "note": "A note.",
            "seed": seed,
            "fingerprint": f"{variant}-{seed}",
            "products": {},
            "commands": [],
            "config": {},
        },
        "metrics": {
            "final": {"loss": loss},
            "curves": {
                **{name: [list(point) for point in curve] for name in ("train_loss", "val_loss")},
                "found_512": [[0.25, 1.0], [0.75, 0.0]],
                "found_1024": [[0.25, 0.5], [0.75, 0.5]],
            },
        },
        "cost": {"seconds": 20.0, "evaluation_seconds": 5.0, "peak_memory_bytes": 1, "tokens_per_second": speed},
        "environment": {
            "cpu": "x",
            "threads": 2,
            "gpus": [],
            "commit": "c" * 40,
            "clean": True,
            "code": "k",
            "packages": {},
            "data": {},
            "models": {},
            **environment,
        },
    }
