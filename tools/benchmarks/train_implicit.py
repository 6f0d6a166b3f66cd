"""implicit's matrix factorisations ALS and BPR, for tools/benchmarks/train.py, which starts it.

They know no sequences. A step is an iteration: each user's known events, once, as what is to be learnt.
"""

from __future__ import annotations

import numpy as np

from tools.benchmarks.train_peer import Validation, serve, specification

WEIGHT, REGULARIZATION = 10, 0.05
"""Of ALS, as in tools/studies/conformance_adapters/run_implicit.py."""


class Implicit:
    """See `train_peer.Trainer`."""

    def __init__(self, spec: dict) -> None:
        # Imported here: implicit is in an environment of its own, and --help must work in ours.
        from implicit.als import AlternatingLeastSquares
        from implicit.bpr import BayesianPersonalizedRanking
        from scipy.sparse import csr_matrix
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, "blas")  # as implicit asks for: it has threads of its own
        self.valid = Validation(spec["file"])
        ones = np.ones(len(self.valid.item), np.float32)
        shape = len(self.valid.last), self.valid.items + 1  # column 0 stays empty
        self.seen = csr_matrix((ones, (self.valid.user, self.valid.item)), shape)
        # A generator, not a seed: each call of `fit` goes on from the model and draws anew.
        settings = {"factors": spec["dim"], "num_threads": spec["threads"]}
        settings["random_state"] = np.random.default_rng(spec["seed"])
        if spec["model"] == "ALS":
            self.model = AlternatingLeastSquares(alpha=WEIGHT, regularization=REGULARIZATION, **settings)
        else:
            self.model = BayesianPersonalizedRanking(learning_rate=spec["lr"], **settings)

    def steps(self, count: int) -> tuple[int, int]:
        """Iterations; no sequence, and the number of events."""
        self.model.iterations = count
        self.model.fit(self.seen, show_progress=False)
        return 0, count * self.seen.nnz

    def validate(self) -> float:
        """NDCG@10 by implicit's own lists."""
        found, _ = self.model.recommend(np.arange(len(self.valid.last)), self.seen, N=10)
        return self.valid.ndcg(1 + np.nonzero(found == self.valid.last[:, None])[1])


if __name__ == "__main__":
    serve(Implicit(specification()))
