"""Gather trained tensors from their shards, and keep them equal, on several processes."""
