"""Adapters on disk: folders and checkpoints, saved, verified, loaded and described."""
