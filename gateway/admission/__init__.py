"""Whether and when a request runs."""
