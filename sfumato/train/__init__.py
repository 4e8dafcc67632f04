"""One training loop, and a file for each thing that is trained."""
