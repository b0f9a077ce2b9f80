"""Add an update to a frozen base layer, and share the making of it across a model."""
