"""Read what runs have left on disk, and show it: as text, and as one HTML file with curves that needs no network."""
