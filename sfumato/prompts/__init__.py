"""From words to Cond."""
