"""Losses: per element first, then reduction."""
