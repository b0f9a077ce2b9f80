"""Define the kinds of adapters: what an update of a weight is, its configuration and its formula, in plain torch."""
