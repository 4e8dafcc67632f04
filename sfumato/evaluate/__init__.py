"""Numbers that tell how good pictures are, and how near one is to another."""
