"""`chasqui serve`: runs all services on this machine, as child processes."""
