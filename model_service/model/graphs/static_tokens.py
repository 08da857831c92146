"""The tokens of recorded steps, in buffers whose addresses stay the same."""

import torch


class StaticTokens:
    """Token ids and positions [rows]."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)

    def fill(self, ids: torch.Tensor, positions: torch.Tensor, rows: int) -> None:
        """Takes over a step's tokens, padded with token 0 at position 0 to so many rows."""
        for buffer, values in ((self.ids, ids), (self.positions, positions)):
            buffer[: len(values)].copy_(values, non_blocking=True)
            # Values of an earlier step would do no harm, but equal rows write equal values.
            buffer[len(values) : rows].zero_()
