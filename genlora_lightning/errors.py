"""Name the errors and warnings that a program may want to tell apart."""

from __future__ import annotations


class DamagedFileError(ValueError):
    """A file is not what was written: truncated, changed, or bits of it have flipped."""


class DataFileError(ValueError):
    """A data file holds something that cannot be used; the message is ``file:line: reason``."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Give what it is made of, so that it comes through to another process."""
        return type(self), (self.where, self.reason)


class DivergedError(RuntimeError):
    """The loss has risen far over where it started; the best adapter before that is kept."""


class MergeReadWeightWarning(UserWarning):
    """A merged weight is computed with in another place, too, where the update has not acted."""


class MergeRoundingWarning(UserWarning):
    """Rounding took a good part of a merged update away."""


class NonFiniteGradientError(RuntimeError):
    """A gradient is NaN or infinite; the step was not made, so the weights are the last good ones."""


class RanksDifferError(RuntimeError):
    """The ranks hold different values of what must be equal on all of them."""


class WrongBaseError(ValueError):
    """An adapter was trained on another base than the model it is to be loaded into."""
