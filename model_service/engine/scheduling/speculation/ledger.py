"""Bounds the time that a draft model may cost: a small share of all time, and what it has saved.

Estimates of chances and times decide whether a draft is worth making. The ledger is there for when
they are wrong, and pays for drafts that are made only to learn whether they would be right.
"""

# Share of each step that drafts may cost without saving anything.
SHARE = 0.01
# In steps without drafts: the balance at the start, and its limits. A debt is kept, because it may
# come from computing a backlog, which the next sequence would need again.
FIRST, LOWEST, HIGHEST = 4.0, -16.0, 16.0


class DraftLedger:
    """A balance in steps without drafts."""

    def __init__(self) -> None:
        self.balance = FIRST

    def step(self) -> None:
        """Adds the share of one step."""
        self._add(SHARE)

    def spend(self, steps: float) -> None:
        """Takes off the time that drafts have cost."""
        self._add(-steps)

    def save(self, steps: float) -> None:
        """Adds the time that right drafts have saved."""
        self._add(steps)

    def _add(self, steps: float) -> None:
        self.balance = min(HIGHEST, max(LOWEST, self.balance + steps))
