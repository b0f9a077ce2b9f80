"""What an update of a weight is: its kinds, with their configurations and formulas, in plain torch."""
