"""Calibration data whose supervision the model itself writes."""

from .datamodule import SelfGeneratedCalibration

__all__ = ["SelfGeneratedCalibration"]
