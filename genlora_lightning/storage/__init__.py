"""Write files whole or not at all, and prove them when they are read; nothing here knows adapters."""
