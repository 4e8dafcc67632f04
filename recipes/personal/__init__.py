"""A character that no model knows, and a style, to try the personal trainers on (docs/personalising.md)."""
