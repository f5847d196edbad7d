"""Fulgurite: a PyTorch Lightning suite that makes language models smaller and cheaper to train.

The four sub-packages are floors, and imports only go down: ``experiments`` (command line, configs, benchmarks) uses
``callbacks``, which use ``datamodules``, which use ``modules``. Importing ``fulgurite`` itself is free of heavy imports.
"""

__version__ = "0.1.0"
