"""Trained tensors on several processes: gathered from their shards, and kept equal."""
