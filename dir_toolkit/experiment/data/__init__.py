"""Data sets and their common parts: image sets, long tails, archives, caches of decoded images, augmentation.

Each reader returns :class:`~dir_toolkit.experiment.data.images.Splits`. An error in a file is a
:class:`~dir_toolkit.errors.DataError`, which names the file and, if known, the line or the byte.
"""
