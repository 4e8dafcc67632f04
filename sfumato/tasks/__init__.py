"""What can be drawn: each task turns a Job into a run of the engine."""
