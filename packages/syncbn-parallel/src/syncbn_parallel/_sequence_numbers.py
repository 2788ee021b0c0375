"""Sequence numbers of autograd nodes, which decide in which order gradients are added.

Of the nodes that are ready, autograd runs the one with the highest sequence number first. The numbers come
from a counter of the *thread* that made the node. If the threads did different things before, autograd would
add the same gradients in another order and round them differently. So all threads of a forward start from
one number.
"""

from __future__ import annotations

from collections import deque
from itertools import repeat, starmap

import torch

# Returns the number that this thread's next autograd node will get.
sequence_number = torch._C._autograd._get_sequence_nr


def raise_sequence_number(target: int) -> None:
    """Raise this thread's counter to ``target``; a higher one stays as it is.

    The counter cannot be set. Its numbers can only be used up, by making nodes that belong to no graph, which
    takes 0.1 microseconds each. That is little beside the work of the thread that used the same numbers for
    real nodes.
    """
    missing = target - sequence_number()
    if missing > 0:
        deque(starmap(torch._C._functions.UndefinedGrad, repeat((), missing)), maxlen=0)
