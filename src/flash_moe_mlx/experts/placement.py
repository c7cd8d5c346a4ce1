"""Placement: the rank that holds each expert, chosen by number or by measured use, and its plan file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DistributedError, RequestError
from ..formats.packed_share import placement_digest

_VERSION = 1


@dataclass(frozen=True)
class Placement:
    """A rank for each expert of each layer.

    Attributes:
        ranks: Number of ranks.
        owners: Rank of each expert, by layer. Shape (E,), int64.
    """

    ranks: int
    owners: Mapping[int, np.ndarray]

    @classmethod
    def by_number(cls, num_experts: Mapping[int, int], ranks: int) -> "Placement":
        """Assign each layer's experts to ranks in turn, beginning with another rank in each layer.

        Args:
            num_experts: Number of experts of each layer.
            ranks: Number of ranks.

        Raises:
            RequestError: If a layer has fewer experts than there are ranks.
        """
        placed = {layer: (np.arange(count) + i) % ranks for i, (layer, count) in enumerate(sorted(num_experts.items()))}
        return cls(ranks, placed)._checked()

    @classmethod
    def by_heat(cls, heat: Mapping[int, np.ndarray], ranks: int, shares: Sequence[float] | None = None) -> "Placement":
        """Place the hottest expert first, each with the rank that has the least load for its share.

        Args:
            heat: Number of tokens that chose each expert, by layer. Shape (E,).
            ranks: Number of ranks.
            shares: Relative load of each rank; None for equal loads.

        Raises:
            RequestError: If a layer has fewer experts than there are ranks.
        """
        share = np.full(ranks, 1.0) if shares is None else np.asarray(shares, float)
        owners = {}
        total = np.zeros(ranks)
        for layer, counts in sorted(heat.items()):
            load, number = np.zeros(ranks), np.zeros(ranks)
            owner = np.zeros(len(counts), np.int64)
            for expert in np.argsort(-counts, kind="stable"):
                # Of equal loads the rank that has fewer experts, then the one with less in the layers before.
                rank = np.lexsort((total / share, number / share, load / share))[0]
                owner[expert] = rank
                load[rank] += counts[expert]
                number[rank] += 1
            owners[layer] = owner
            total += load
        return cls(ranks, owners)._checked()

    @classmethod
    def read(cls, path: str | Path, num_experts: Mapping[int, int], ranks: int) -> "Placement":
        """Read a plan file, and check it against a model and a number of ranks.

        Raises:
            RequestError: If it can't be read, or belongs to another model or number of ranks.
        """
        try:
            plan = json.loads(Path(path).read_text())
            owners = {int(layer): np.array(owner, np.int64) for layer, owner in plan["owners"].items()}
            placement = cls(int(plan["ranks"]), owners)
            version = plan["version"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RequestError(
                f"[{path}] must be a plan of shards, got {type(error).__name__}: {error}. Write it again."
            ) from error
        shapes = {layer: owner.shape for layer, owner in owners.items()}
        wanted = {layer: (count,) for layer, count in num_experts.items()}
        if version != _VERSION or placement.ranks != ranks or shapes != wanted:
            raise RequestError(
                f"[{path}] must be a plan (version {_VERSION}) of {ranks} ranks for this model's layers and experts, "
                f"got version {version}, {placement.ranks} ranks and {len(owners)} layers. Write one for this model."
            )
        return placement._checked()

    def write(self, path: str | Path) -> None:
        """Write the plan file."""
        owners = {str(layer): owner.tolist() for layer, owner in sorted(self.owners.items())}
        Path(path).write_text(json.dumps({"version": _VERSION, "ranks": self.ranks, "owners": owners}))

    @property
    def digest(self) -> int:
        """A 32-bit checksum of the placement."""
        return placement_digest(self.ranks, {layer: owner.tolist() for layer, owner in self.owners.items()})

    def counts(self, rank: int) -> dict[int, int]:
        """Return how many experts of each layer a rank keeps."""
        return {layer: int((owner == rank).sum()) for layer, owner in self.owners.items()}

    def _checked(self) -> "Placement":
        for layer, owner in self.owners.items():
            if len(np.unique(owner)) != self.ranks or owner.min() < 0 or owner.max() >= self.ranks:
                raise RequestError(
                    f"[shards] each of {self.ranks} ranks must keep an expert of each layer, got layer {layer} of "
                    f"{len(owner)} experts on ranks {sorted(set(owner.tolist()))}. Use fewer ranks or another plan."
                )
        return self


def check_alike(numbers: Mapping[str, Sequence[int]]) -> None:
    """Check that the numbers gathered from all ranks are equal.

    Args:
        numbers: Numbers gathered from the ranks, by what they describe.

    Raises:
        DistributedError: If they differ, saying in what and which ranks.
    """
    for what, values in numbers.items():
        if other := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise DistributedError(
                f"[ranks] all must have the same {what}, got another than rank 0's on rank "
                f"{', '.join(map(str, other))}. Give every host the same files, version and arguments."
            )
