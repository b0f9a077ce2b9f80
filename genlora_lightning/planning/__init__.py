"""Count memory, traffic and parameters of a run before there is a GPU."""
