"""Adapters to other training libraries. Each module needs the library in its name."""
