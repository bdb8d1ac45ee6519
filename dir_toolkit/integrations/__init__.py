"""Adapters to libraries that users already train with. Each module needs the library that it is named after."""
