"""Name the commands that Lightning's command line runs, so that the tool can list them without importing it."""

from __future__ import annotations

# What each does, as a sentence without its full stop.
TRAINING = {
    "fit": "train an adapter, from a configuration and flags",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "write a checkpoint's answers to a file",
    "find_lr": "try rising learning rates for some steps, and plot the loss",
}
