"""One order in which autograd adds up gradients, in every run.

Of the nodes that are ready, autograd takes the one with the highest sequence number first, and the numbers
come from a counter of the *thread* that made the node. In threads that did other things before, the same
gradients would be added in another order, with another rounding. So all threads of a forward start from one
number.
"""

from __future__ import annotations

from collections import deque
from itertools import repeat, starmap

import torch

# Returns the number that this thread's next autograd node will get.
sequence_number = torch._C._autograd._get_sequence_nr


def raise_sequence_number(target: int) -> None:
    """Raise this thread's counter to ``target``; a higher one stays as it is.

    The counter cannot be set, its numbers can only be used up. A node of no graph does that in 0.1
    microseconds: little beside the work of the thread whose counter it follows, which used its numbers on
    real nodes.
    """
    missing = target - sequence_number()
    if missing > 0:
        deque(starmap(torch._C._functions.UndefinedGrad, repeat((), missing)), maxlen=0)
