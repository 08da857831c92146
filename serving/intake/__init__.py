"""What every RPC passes: bounds on connections, messages and turns, and the interceptor."""
