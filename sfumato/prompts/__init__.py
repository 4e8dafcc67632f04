"""The prompt grammar: from a prompt as typed to token ids with weights. A library of its own; it knows no network.

prompt.parse reads a whole prompt; its texts go through emphasis.emphasis, chunks.chunks and chunks.rows to the text
encoder, and weighting.weigh works on what comes back. docs/prompts.md is the grammar for users.
"""
