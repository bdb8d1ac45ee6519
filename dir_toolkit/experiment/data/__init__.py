"""Data sets, and what they share: image sets, long tails, archives, decoded images on disk, random changes of images.

Each reader returns :class:`~dir_toolkit.experiment.data.images.Splits`. An error that lies in a file is a
:class:`~dir_toolkit.errors.DataError` and names the file, with the line or the byte where there is one.
"""
