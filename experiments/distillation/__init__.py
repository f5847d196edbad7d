"""Configs, benchmark scripts and committed results of distillation."""
