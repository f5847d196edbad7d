"""Grids of methods, settings and seeds: their plan, their cells, their results, and the tables and plots made of these."""
