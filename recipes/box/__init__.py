"""The model in the box: its data, its training, its contact sheet."""
