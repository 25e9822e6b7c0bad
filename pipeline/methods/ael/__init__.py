"""AEL (Hu et al., NeurIPS 2021)."""
