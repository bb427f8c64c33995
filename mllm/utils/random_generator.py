"""Makes random generators that depend on nothing but what they are for.

Knows hashes. Does not know samples or augmentation.
"""

import hashlib
import json

import numpy as np


def random_generator(seed: int, epoch: int, sample_id: str, purpose: str) -> np.random.Generator:
    """Return a generator that is the same wherever and whenever these four are the same, and independent otherwise.

    Counter-based (Philox) with a hash of the four as its key: no state is carried from sample to sample, so a resumed
    run, another number of workers or of ranks, all get the numbers that the uninterrupted run gets.
    """
    name = json.dumps([int(seed), int(epoch), sample_id, purpose]).encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
