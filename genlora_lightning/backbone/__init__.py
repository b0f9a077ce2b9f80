"""The frozen model: found, built, read piece by piece, and recognised."""
