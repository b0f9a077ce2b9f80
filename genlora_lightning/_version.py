"""Hold the version, which everything can read without the package's face."""

__version__ = "0.1.0"
