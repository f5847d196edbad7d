"""Configs, commands and benchmark of offsite prefix tuning."""
