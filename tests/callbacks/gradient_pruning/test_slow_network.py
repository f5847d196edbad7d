"""Ranks on a real, shaped network: a link that is cut, a rank that dies, a run that goes on after a kill."""

import signal
import sys
import time

import pytest
import torch
import yaml

from fulgurite.experiments.netlab import NetLab, what_is_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(what_is_missing() is not None, reason=f"no network can be made here: {what_is_missing()}"),
]


def start(lab, folder, text_file, *words, steps=40):
    """Start a training on all ranks."""
    options = {
        "model.source": "random:tiny",
        "model.student": "null",
        "data.train": text_file,
        "data.block_size": 64,
        "data.batch_size": 1,
        "data.val_tokens": 256,
        "trainer.max_steps": steps,
        "trainer.num_nodes": lab.ranks,
        "trainer.devices": 1,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp",
        "trainer.val_check_interval": 1000,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger": "false",
        "run": "lab",
    }
    callbacks = [
        {"class_path": "GradientPruning", "init_args": {"policy": {"class_path": "FixedRate"}, "warmup": 2, "check_every": 5}},
        {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 10, "save_top_k": -1, "filename": "{step}"}},
    ]
    arguments = ["fit", "-c", "gradient_pruning/train", *(f"--{name}={value}" for name, value in options.items())]
    arguments += [f"--trainer.callbacks={yaml.safe_dump(callbacks, default_flow_style=True, width=1000).strip()}", *words]
    script = folder / "rank.py"
    script.write_text(
        "if __name__ == '__main__':\n    from fulgurite.experiments.main import main\n" + f"    main({arguments!r})\n"
    )
    return [
        lab.start(rank, [sys.executable, str(script)], folder=folder, log=folder / f"{rank}.txt") for rank in range(lab.ranks)
    ]


def wait_for_step(folder, step, seconds=120):
    """Wait for a checkpoint."""
    path = folder / "runs" / "gradient-pruning" / "lab" / "checkpoints" / f"step={step}.ckpt"
    begin = time.perf_counter()
    while not path.is_file():
        assert time.perf_counter() - begin < seconds, (folder / "0.txt").read_text()[-2000:]
        time.sleep(0.1)
    return path


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_link_that_is_cut_for_ten_seconds_only_slows(tmp_path, text_file):
    with NetLab(2, "5mbit") as lab:
        processes = start(lab, tmp_path, text_file, steps=200)
        wait_for_step(tmp_path, 10)
        lab.cut(1)
        time.sleep(10)
        assert [process.poll() for process in processes] == [None, None]
        lab.restore(1)
        assert [process.wait(200) for process in processes] == [0, 0], (tmp_path / "0.txt").read_text()[-2000:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_dies_ends_all_with_one_message_and_the_run_goes_on(tmp_path, text_file, ranks):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    with NetLab(ranks, "100mbit") as lab:
        assert [process.wait(200) for process in start(lab, tmp_path / "whole", text_file)] == [0] * ranks
    with NetLab(ranks, "2mbit") as lab:
        processes = start(lab, tmp_path / "parts", text_file)
        wait_for_step(tmp_path / "parts", 20)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(60) == 1
        said = (tmp_path / "parts" / "0.txt").read_text()
        assert said.count("The exchange of gradients failed after step") == 1
        assert "--ckpt_path last" in said
        assert "Traceback" not in said
    with NetLab(ranks, "100mbit") as lab:
        again = start(lab, tmp_path / "parts", text_file, "--ckpt_path=last")
        assert [process.wait(200) for process in again] == [0] * ranks, (tmp_path / "parts" / "0.txt").read_text()[-2000:]
    one, two = (weights(wait_for_step(tmp_path / name, 40)) for name in ("whole", "parts"))
    for name, tensor in one.items():
        assert torch.isfinite(two[name]).all(), name
        if ranks == 2:  # sums of three depend on their order, and that on the buckets, which DDP arranges anew
            assert torch.equal(tensor, two[name]), name
