"""Rounds of averaging among parties, on Flower."""
