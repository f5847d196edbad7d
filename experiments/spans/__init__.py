"""Attention spans: configs, measurements and the benchmark."""
