"""Many pictures from a table: each row a Job, drawn exactly once, however often the run is ended and begun again."""
