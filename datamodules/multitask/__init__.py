"""Tasks for multi-task training."""

from .datamodule import MultiTaskDataModule
from .row_tasks import ClassificationTask, GenerationTask, RegressionTask, RowTask, TaggingTask
from .self_supervised import TextTask
from .tables import TableRows, read_table
from .tasks import Task

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
