"""One of several ranks in one process, for tests of what is summed over all of them."""

import torch

from beit_fast.train.distributed.world import World


class Rank(World):
    """Adds up what each rank passes, in place of an all-reduce: the last of them sees the totals."""

    def __init__(self, rank, size, totals):
        super().__init__(rank, size, torch.device("cpu"))
        object.__setattr__(self, "totals", totals)
        object.__setattr__(self, "calls", iter(range(100)))

    def sum(self, value):
        place = next(self.calls)
        if len(self.totals) <= place:
            self.totals.append(torch.zeros_like(value))
        self.totals[place] += value
        return value.copy_(self.totals[place])
