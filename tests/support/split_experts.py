"""An executor made of several: each computes its own experts, as hosts of a distributed model do."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from flash_moe_mlx.experts.executor import ELSEWHERE, ExpertExecutor, PendingExperts, TokenExperts
from flash_moe_mlx.ops.cpu.program import ExpertOperations
from flash_moe_mlx.ops.cpu.vectors import Pool, Vector
from flash_moe_mlx.ops.expert_ffn_combine import shared_expert
from flash_moe_mlx.ops.moe_combine import moe_combine
from flash_moe_mlx.ops.norm import Norm
from flash_moe_mlx.ops.slot_memory import ExpertRecords


class SplitExperts:
    """Routed experts of one layer over executors, of which each owns the ids with ``owner[id]`` its number."""

    def __init__(self, executors: Sequence[ExpertExecutor], owner: np.ndarray):
        self.executors = tuple(executors)
        self.owner = owner

    def shares(self, ids: np.ndarray) -> list[np.ndarray]:
        return [np.where(self.owner[ids] == number, ids, ELSEWHERE) for number in range(len(self.executors))]

    def begin(self, ids, weights=None, *, alongside=(), traced=True) -> "SplitPending":
        mx.eval(*alongside)
        shares = self.shares(np.array(ids).astype(np.int64))
        return SplitPending([e.begin(share, traced=False) for e, share in zip(self.executors, shares, strict=True)])

    def resident(self) -> None:
        return None

    def token_experts(self, x: Vector, y: np.ndarray, pool: Pool) -> "SplitToken":
        # Each its own, since their operations run side by side.
        pools = [pool.get(("split", number), lambda: Pool(int8=x.int8)) for number in range(len(self.executors))]
        tokens = [executor.token_experts(x, y, own) for executor, own in zip(self.executors, pools, strict=True)]
        return SplitToken(self, tokens)


class SplitPending:
    def __init__(self, pending: Sequence[PendingExperts]):
        self.pending = pending

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        outputs = []
        for pending in self.pending:
            outputs.append(pending.run(x, norm))
            mx.eval(outputs[-1])
        return sum(outputs[1:], start=outputs[0])

    def combined(self, x, weights, shared, shared_gate, residual, norm=None) -> mx.array:
        assert not isinstance(shared, ExpertRecords), shared_expert
        return moe_combine(self.run(x, norm), weights, shared, shared_gate, residual)


class SplitToken:
    exchanges = False

    def __init__(self, split: SplitExperts, tokens: Sequence[TokenExperts]):
        self.split, self.tokens = split, tokens
        self.present = ExpertOperations.joined([token.present for token in tokens])
        self.missing = ExpertOperations.joined([token.missing for token in tokens])
        self.late: list[TokenExperts] = []

    def begin(self, ids: np.ndarray, weights: np.ndarray) -> bool:
        self.late = []
        for token, share in zip(self.tokens, self.split.shares(ids), strict=True):
            token.missing.set([], [])
            if token.begin(share, weights):
                self.late.append(token)
        return bool(self.late)

    def finish(self) -> None:
        for token in self.late:
            token.finish()

    def exchange(self) -> None:
        raise AssertionError("nothing comes from elsewhere")
