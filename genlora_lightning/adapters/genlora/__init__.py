"""Generate low-rank matrices from latent vectors by radial basis functions: GenLoRA."""
