"""What the nodes of a launch tell each other about failed ranks, over the store they met at."""

from __future__ import annotations

import json
import time

from torch.distributed import Store

from modalities_parallel.root_cause import Failure

SHARE_SECONDS = 5.0
ASK_SECONDS = 1.0
KEY = "modalities/failed"


class NodeFailures:
    """One node's view of the failures of all nodes.

    A store that is gone has gone with the node that kept it; what is known here has to do then.

    Args:
        store: that all nodes share.
        node: the number of this one.
        count: of nodes.
    """

    def __init__(self, store: Store, node: int, count: int) -> None:
        self._store = store
        self._node = node
        self._count = count
        self._asked = time.monotonic()

    def elsewhere(self) -> bool:
        """Whether a rank of any node has failed, as far as is known; asks once in a second."""
        if self._count == 1 or time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        try:
            return self._store.check([KEY])
        except RuntimeError:
            return False

    def announce(self) -> None:
        """Tell the other nodes that a rank has failed."""
        if self._count == 1:
            return
        try:
            self._store.set(KEY, "1")
        except RuntimeError:
            return

    def exchange(self, own: Failure | None) -> list[Failure]:
        """The root causes of all nodes, as far as they tell theirs within a few seconds; every node calls it."""
        found = {} if own is None else {self._node: own}
        if self._count == 1:
            return list(found.values())
        deadline = time.monotonic() + SHARE_SECONDS
        try:
            self._store.set(f"{KEY}/{self._node}", json.dumps(own))
            for node in range(self._count):
                key = f"{KEY}/{node}"
                while not (there := self._store.check([key])) and time.monotonic() < deadline:
                    time.sleep(0.05)
                if there and (content := json.loads(self._store.get(key))) is not None:
                    found[node] = Failure(*content)
        except RuntimeError:
            return list(found.values())
        return list(found.values())
