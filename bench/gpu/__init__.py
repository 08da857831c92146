"""The engine on one GPU, against what the card can do: `python -m bench.gpu`."""
