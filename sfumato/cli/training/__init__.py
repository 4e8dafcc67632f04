"""The subcommands of `sfumato train`: whole networks, what steers and personalises them, and how far a run is."""
