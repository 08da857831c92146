"""The handlers of the API: each answers one request that its endpoint has read."""
