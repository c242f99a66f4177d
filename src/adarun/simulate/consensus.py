"""How far replicas drift apart between exchanges, and what that takes from a sample's worth.

The measure is the consensus distance of Kong, Lin, Koloskova, Jaggi and Stich, "Consensus Control for Decentralized Deep
Learning", ICML 2021: the root mean square distance of the replicas from their mean. Below a critical distance decentralised
training converges at the rate of centralised training, up to a constant.
"""

from __future__ import annotations

import math


def squared_distance(topology: str, sync_period: int, num_workers: int, drift: float) -> float:
    """The mean squared consensus distance at which gradients are computed, in the long run.

    Each local step moves every replica by independent noise with mean square `drift`, in any unit, which is also the
    result's. Over a period the squared distance grows by (1 - 1/n) drift a step. An all-reduce brings it back to 0. The
    j-th gossip exchange after a step leaves (2^-j - 1/n) of it, so 1 - (1 + log2 n)/n of each period's growth is there in
    the long run; exact for n a power of 2.
    """
    growth = 0.5 * (sync_period - 1) * (1.0 - 1.0 / num_workers)
    kept = sync_period * (1.0 - (1.0 + math.log2(num_workers)) / num_workers) if topology == "gossip" else 0.0
    return drift * (growth + max(0.0, kept))


def efficiency(squared: float) -> float:
    """What a sample is worth, 0 to 1, at a squared distance in units of the critical one.

    The critical distance is the one at which the drift adds as much to the error bound as the gradients' own noise does, so
    as many samples again are needed. The curve through both is the simplest one, not the paper's.
    """
    return 1.0 / (1.0 + squared)
