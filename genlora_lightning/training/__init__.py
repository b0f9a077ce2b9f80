"""Fine-tune any LightningModule: the callback, and its optimizer, strategies, checks and resume."""
