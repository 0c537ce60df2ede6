"""The version, and the number that says when our arithmetic changed."""

__version__ = "0.1.0"

NUMERICS_VERSION = 3
"""Part of every run's identity: raised when the same configuration would give other weights."""

CHECKPOINT_VERSION = 1
"""The layout of a checkpoint file; a reader refuses files newer than itself."""

OLDEST_NUMERICS = 3
"""The first whose weights have the names of today; checkpoints of older ones need the revision that made them."""
