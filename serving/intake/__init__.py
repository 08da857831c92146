"""The way of a call into a service: limits of connections and requests, then the interceptor."""
