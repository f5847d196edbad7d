"""Data of a tiny system: a text that sets its own tasks, and a table."""

import csv

import pytest

from fulgurite.datamodules import ClassificationTask, MultiTaskDataModule, TextTask
from fulgurite.datamodules.multitask import TableRows


@pytest.fixture
def table(tmp_path):
    with open(tmp_path / "parity.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"number {place} is {('even', 'odd')[place % 2]}", ("yes", "no")[place % 2]] for place in range(60))
    return str(tmp_path / "parity.csv")


@pytest.fixture
def data(table, long_documents):
    def make(**settings):
        tasks = {
            "text": TextTask(long_documents, length=48, val_rows=8, val_fraction=0.2),
            "parity": ClassificationTask(TableRows(table), length=32),
        }
        return MultiTaskDataModule(tasks, **{"batch_size": 6, "seed": 0, **settings})

    return make
