"""Hints from pictures: edges, lines, blocks of colour. Each annotator has a name, options with ranges, a function."""

from sfumato.images.annotate import edges, plain
from sfumato.images.annotate.registry import ANNOTATORS, Annotator, Network, Option, annotate, find_annotator

__all__ = ["ANNOTATORS", "Annotator", "Network", "Option", "annotate", "edges", "find_annotator", "plain"]
