"""The command line: `sfumato txt2img`, `sfumato replay`. Turns flags into Jobs, and errors into one line."""
