"""The order in which autograd adds up gradients, made the same in every run.

Of the nodes that are ready, autograd takes the one with the highest sequence number first. The numbers come from a counter of
the *thread* that made the node. Threads that worked on other things before would therefore add the same gradients in another
order, with other rounding. So all threads of a forward start from one number.
"""

from __future__ import annotations

from collections import deque
from itertools import repeat, starmap

import torch

# The number that this thread's next autograd node will get.
sequence_number = torch._C._autograd._get_sequence_nr


def raise_sequence_number(target: int) -> None:
    """Raise this thread's counter to ``target``; a higher one stays as it is.

    There is no way to set the counter, only to use numbers up. A node that belongs to no graph does that in about 0.1
    microseconds, a small part of what the nodes cost that the other thread's counter has counted.
    """
    missing = target - sequence_number()
    if missing > 0:
        deque(starmap(torch._C._functions.UndefinedGrad, repeat((), missing)), maxlen=0)
