"""Protecting: what a picture may show, marks that it carries, and who made it. Knows no flags and draws nothing."""
