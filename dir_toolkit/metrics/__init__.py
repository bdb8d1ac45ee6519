"""Metrics: update and compute, float64, by region, with counts."""
