"""Files written whole or not at all, and proved when they are read; nothing here knows adapters."""
