"""Feature distribution smoothing (FDS) of features between backbone and head.

The public class is :class:`dir_toolkit.FDS` in ``fds``. Its parts are: ``moments`` accumulates the features of an
epoch, ``running`` keeps the statistics of all epochs and saves them, ``covariance`` turns them into maps, ``maps``
holds the formulas of these maps, ``hooks`` applies them inside a model, and ``passes`` handles activation
checkpointing. ``matrix_moments`` and ``matrix_covariance`` implement the full and the low-rank covariance.

FDS checks its arguments. The parts take checked values, and check only what was loaded from a file. All statistics are
float64, and NaN where they are not known. Buffers are created outside inference mode, since training could not use them
otherwise.
"""

from .fds import FDS

__all__ = ["FDS"]
