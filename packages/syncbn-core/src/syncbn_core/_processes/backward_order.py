"""One order of the backward collectives in all processes.

If processes issue their collectives in different orders, they hang or mix them up. With parallel branches in
a net, the order of a backward depends on which node is ready first and on sequence numbers. So the nodes that
run a collective are chained: each gets the result of the previous one as an input that it does not read. Then
autograd has to run them in exactly the reverse order.

A chain makes all of its nodes reachable from the last one. So it must not connect what is differentiated
separately, such as a generator, and a discriminator that looks at its detached images. Two nodes are in one
chain if

- they belong to one forward of replicated modules, which has a group (so one backward has to differentiate
  all of that forward, or the first has to retain the graph); or
- the input of the later node depends on a node of the chain. A backward through that input reaches the
  chain's graph in any case.

Otherwise, in one process with one backward thread, autograd runs the nodes in the reverse of the order in
which they were made.

A chain ends when a backward has begun. The graph keeps its last result; this module only has a weak reference
to it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from syncbn_comm import ReplicaGroup

# How many nodes to search for the chain that an input depends on: a few layers without synchronization.
_NODES_LOOKED_AT = 100

_by_group: weakref.WeakKeyDictionary[ReplicaGroup, Chain] = weakref.WeakKeyDictionary()


class Chain:
    """Nodes that run a collective, in the order in which they were made."""

    def __init__(self) -> None:
        self.over = False  # a backward has begun
        self._last: Callable[[], Tensor | None] | None = None

    def take(self) -> Tensor:
        """Return the result of the last node, or a tensor of no node if there is none."""
        last = self._last() if self._last is not None else None
        # It needs a gradient even if no input does: then every process takes part in the backward.
        return torch.empty(0, requires_grad=True) if last is None else last

    def give(self, result: Tensor) -> None:
        """Continue after the node with this result, which something else has to keep alive."""
        self._last = weakref.ref(result)

    def give_node(self, node: Node) -> None:
        """Continue after this node, whose last saved tensor is one of its results."""
        self._last = partial(_last_saved, weakref.ref(node))


def _last_saved(reference: weakref.ref[Node]) -> Tensor | None:
    node: Any = reference()
    try:
        return None if node is None else node.saved_tensors[-1]
    except RuntimeError:  # a saved tensor was changed in place: the node's backward raises the same
        return None


def chain_of(x: Tensor, group: ReplicaGroup | None) -> Chain:
    """Return the chain that a node belongs to.

    Args:
        x: the input of replica 0.
        group: the replicas of this forward, if there are several.
    """
    chain = _chain_behind(x.grad_fn) if group is None else _by_group.get(group)
    if chain is None or chain.over:
        chain = Chain()
    if group is not None:
        _by_group[group] = chain
    return chain


def _chain_behind(node: Node | None) -> Chain | None:
    """Return the chain of the nearest node that this one depends on and that has a chain."""
    seen = {node}
    queue = deque([node])
    while queue and len(seen) < _NODES_LOOKED_AT:
        node = queue.popleft()
        if node is None:
            continue
        chain = getattr(node, "chain", None)
        if isinstance(chain, Chain):
            return chain
        for behind, _ in node.next_functions:
            if behind not in seen:
                seen.add(behind)
                queue.append(behind)
    return None
