"""Features on their way from the backbone to the head: feature distribution smoothing.

Users meet :class:`dir_toolkit.FDS` in ``fds``. It is built of parts that can be read one at a time: ``moments`` gathers
the features of an epoch, ``running`` keeps the statistics of all epochs and saves them, ``covariance`` turns them into
maps, whose formulas are in ``maps``, ``hooks`` applies the maps inside a model, and ``passes`` does so under activation
checkpointing. ``matrix_moments`` and ``matrix_covariance`` hold the full and the low-rank covariance, which few need.

FDS checks what it is handed. The parts take values that were checked, and check only what comes out of a file. All
statistics are float64, and they are NaN where they are not known. What is kept is made outside inference mode, because
training could not use it otherwise.
"""

from .fds import FDS

__all__ = ["FDS"]
