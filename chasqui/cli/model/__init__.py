"""`chasqui model`: work on the files of a model."""
