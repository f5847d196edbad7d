"""Tasks for multi-task training."""

from .datamodule import MultiTaskDataModule
from .self_supervised import TextTask
from .tables import read_table
from .tasks import ClassificationTask, GenerationTask, RegressionTask, RowTask, TableRows, TaggingTask, Task

__all__ = [
    "ClassificationTask",
    "GenerationTask",
    "MultiTaskDataModule",
    "RegressionTask",
    "RowTask",
    "TableRows",
    "TaggingTask",
    "Task",
    "TextTask",
    "read_table",
]
