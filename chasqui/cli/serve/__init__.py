"""`chasqui serve`: all services on this machine, as child processes."""
