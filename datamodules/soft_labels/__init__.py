"""Stores of soft labels: format, reading and writing, and the data module that trains from them."""

from .appender import SoftLabelAppender
from .codec import StoredSequence, StoreError
from .datamodule import SoftLabelDataModule
from .format import StoreHeader
from .store import SoftLabelStore

__all__ = ["SoftLabelAppender", "SoftLabelDataModule", "SoftLabelStore", "StoreError", "StoreHeader", "StoredSequence"]
