"""Configs, benchmark and results of multi-task training."""
