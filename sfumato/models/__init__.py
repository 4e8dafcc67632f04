"""Networks: one frozen config each; they know nothing of files, devices or prompts."""
