"""Text to ids to packed batches: read sources, tokenise once, draw rows in a resumable order."""
