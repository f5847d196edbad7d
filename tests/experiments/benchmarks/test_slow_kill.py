import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fulgurite.experiments.benchmarks.results import load_results

RUN = (
    "import sys; from pathlib import Path; from fulgurite.experiments.benchmarks import plan; "
    "plan.EXPERIMENTS = Path(sys.argv[1]); from fulgurite.experiments.main import main; main(sys.argv[2:])"
)


@pytest.mark.slow
def test_a_killed_benchmark_ends_with_every_cell_once(bench, text_file, tmp_path):
    plan = bench()
    words = [sys.executable, "-c", RUN, str(tmp_path / "experiments"), "benchmark", "method", f"--data={text_file.parent}"]
    draw = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(4, 25))
        process.kill()
        process.wait()
        for entry in load_results(plan.results):  # what is there is whole
            assert entry["metrics"]["final"]["loss"] > 0
    time.sleep(2)
    assert not _cells_alive(tmp_path), "a cell outlived its benchmark"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in plan.results.iterdir()) == ["fast-0.json", "slow-0.json", "slow-1.json"]
    times = {path: path.stat().st_mtime_ns for path in plan.results.iterdir()}
    begin = time.perf_counter()
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert time.perf_counter() - begin < 10
    assert "3 cells, 3 done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in plan.results.iterdir()} == times


@pytest.mark.slow
def test_interrupted_by_the_keyboard_it_leaves_no_half_result(bench, text_file, tmp_path):
    plan = bench(lambda spec: spec["variants"].pop("slow"))
    words = [sys.executable, "-c", RUN, str(tmp_path / "experiments"), "benchmark", "method", f"--data={text_file.parent}"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "The same command goes on" in out
    assert not list(plan.results.glob("*")) if plan.results.exists() else True
    assert not _cells_alive(tmp_path)


@pytest.mark.slow
def test_a_cell_that_is_told_to_stop_has_failed(bench, text_file, tmp_path):
    plan = bench(lambda spec: spec["variants"].pop("slow"))
    words = [sys.executable, "-c", RUN, str(tmp_path / "experiments"), "benchmark", "method", f"--data={text_file.parent}"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    logs = tmp_path / "runs/benchmark/method/cpu/products"
    while process.poll() is None and not any("Epoch" in log.read_text("utf-8", "replace") for log in logs.glob("*/log.txt")):
        time.sleep(0.02)
    (pid,) = _cells_alive(tmp_path)
    os.kill(pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "killed by signal 15" in error
    assert not plan.results.exists()


def _cells_alive(folder):
    alive = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if "benchmarks.cell" in command and str(folder) in command:
            alive.append(int(pid))
    return alive
