"""The chat page: static files in `static/`, and how they are served."""
