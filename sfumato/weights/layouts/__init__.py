"""The layouts that checkpoints come in: key tables, configs, and opening a single file or a folder."""
