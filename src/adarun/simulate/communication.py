"""What an exchange costs, by the alpha-beta model: a message takes a latency alpha and beta seconds per byte.

The all-reduces are those of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH",
IJHPCA 19(1), 2005; adding up what arrives is taken to cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TOPOLOGIES = ("ring", "tree", "hierarchical", "gossip")


@dataclass(frozen=True)
class Link:
    """What connects two workers."""

    latency: float  # alpha, seconds
    seconds_per_byte: float  # beta

    def seconds(self, num_bytes: float) -> float:
        """How long one message takes; both directions at once take no longer."""
        return self.latency + self.seconds_per_byte * num_bytes


def ring_seconds(link: Link, num_workers: int, num_bytes: float) -> float:
    """Reduce-scatter and all-gather around a ring: 2(n - 1) messages of an n-th each."""
    return 2 * (num_workers - 1) * link.seconds(num_bytes / num_workers)


def tree_seconds(link: Link, num_workers: int, num_bytes: float) -> float:
    """Reduce to one worker and broadcast from it along a binomial tree: 2 log2(n) whole messages."""
    return 2 * math.ceil(math.log2(num_workers)) * link.seconds(num_bytes)


@dataclass(frozen=True)
class Network:
    """Nodes of equally many workers: one kind of link inside a node, another one between nodes."""

    num_nodes: int
    workers_per_node: int
    inside: Link
    between: Link

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return self.num_nodes * self.workers_per_node

    def seconds(self, topology: str, num_bytes: float) -> float:
        """How long the workers take to exchange `num_bytes` each.

        Raises:
            ValueError: there is no such topology.
        """
        # What does not know of nodes goes at the pace of the link between them.
        link = self.between if self.num_nodes > 1 else self.inside
        if self.num_workers == 1:
            return 0.0
        if topology == "ring":
            return ring_seconds(link, self.num_workers, num_bytes)
        if topology == "tree":
            return tree_seconds(link, self.num_workers, num_bytes)
        if topology == "hierarchical":
            return self._hierarchical_seconds(num_bytes)
        if topology == "gossip":
            return link.seconds(num_bytes)
        raise ValueError(f"there is no topology {topology!r}; there are {', '.join(TOPOLOGIES)}")

    def _hierarchical_seconds(self, num_bytes: float) -> float:
        """Reduce-scatter inside each node, a ring of the nodes for each part, all-gather inside each node.

        The parts of one node share its link to the others, so together they are as slow as one ring of the whole.
        """
        return ring_seconds(self.inside, self.workers_per_node, num_bytes) + ring_seconds(
            self.between, self.num_nodes, num_bytes
        )


def peer_offset(exchange: int, num_workers: int) -> int:
    """How far away the worker is from which each takes a model in the gossip exchange of this number.

    The one-peer exponential graph: 1, 2, 4 ... and again (Ying et al., "Exponential Graph is Provably Efficient for
    Decentralized Deep Training", NeurIPS 2021).
    """
    return 1 << exchange % max(1, math.ceil(math.log2(num_workers)))
