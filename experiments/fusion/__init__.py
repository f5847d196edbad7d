"""Fusion compression: its configs."""
