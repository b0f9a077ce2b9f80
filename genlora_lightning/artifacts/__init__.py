"""Save, verify, load and describe adapters on disk: folders, checkpoints and merged models."""
