"""Find, build, read and recognise the frozen model."""
