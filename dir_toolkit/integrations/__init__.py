"""Adapters to libraries that users already train with; each module needs the library it is named after."""
