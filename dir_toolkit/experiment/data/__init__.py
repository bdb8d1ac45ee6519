"""Readers that trust nothing, and data the package draws itself."""
