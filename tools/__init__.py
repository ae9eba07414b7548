"""Upkeep of the repository itself: `make check` and `make readme`. Nothing here is needed to train."""
