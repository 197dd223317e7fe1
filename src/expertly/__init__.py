"""The Mixture-of-Experts toolkit for the Hugging Face stack. Importing it costs nothing."""

__version__ = "0.1.0"
