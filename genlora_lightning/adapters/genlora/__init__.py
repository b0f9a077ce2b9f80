"""GenLoRA: latent vectors, and the radial basis functions that make low-rank matrices of them."""
