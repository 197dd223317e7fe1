"""The experts' computation behind transformers' experts seam."""
