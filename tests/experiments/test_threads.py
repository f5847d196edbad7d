import os

import pytest

from fulgurite.experiments.threads import threads_each


@pytest.mark.parametrize(("said", "processes", "each"), [("8", 2, "4"), ("8", 3, "2"), ("2", 4, "1"), ("1", 1, "1")])
def test_processes_share_the_threads_of_the_one_that_starts_them(monkeypatch, said, processes, each):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_each(processes) == {"OMP_NUM_THREADS": each}


@pytest.mark.parametrize("said", [None, "", "two"])
def test_without_a_number_all_cores_are_shared(monkeypatch, said):
    monkeypatch.delenv("OMP_NUM_THREADS") if said is None else monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert threads_each(2) == {"OMP_NUM_THREADS": "8"}
