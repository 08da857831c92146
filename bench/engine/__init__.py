"""The engine without the network: `python -m bench.engine`."""
