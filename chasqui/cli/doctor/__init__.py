"""`chasqui doctor`: whether this machine can run the services, and what to do if not."""
