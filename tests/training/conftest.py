"""Models that the training tests share."""

from laws.conftest import pair_of

__all__ = ["pair_of"]
