"""Complete, reproducible histories of how models were made."""
