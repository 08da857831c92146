"""How often drafts are right: the chance that the next one is, learned from the last ones."""

from dataclasses import dataclass


@dataclass(slots=True)
class Acceptance:
    """The share of right drafts of one source; the latest count most."""

    right: float  # weight of the right ones
    weight: float  # of all
    memory: float  # share of its weight that an observation keeps when another comes

    @classmethod
    def expecting(cls, chance: float, weight: float, memory: float) -> "Acceptance":
        """Begins at `chance`, which counts as much as `weight` observations."""
        return cls(chance * weight, weight, memory)

    @property
    def chance(self) -> float:
        """That a draft is right if all before it in its step are."""
        return self.right / self.weight

    def observe(self, *, right: bool) -> None:
        self.right = self.memory * self.right + right
        self.weight = self.memory * self.weight + 1
