"""Configs for plain training and fine-tuning."""
