"""MemoryPlan: the use of a memory limit, decided once by load and passed to all owners of memory. No MLX import."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import StreamingConfig
from ..errors import MemoryLimitError
from ..formats.checkpoint import Checkpoint
from ..formats.expert_layout import RecordLayout
from ..machine import usable_memory_bytes
from ..storage.io_choice import Reads, choose_io, choose_threads
from .budget import MAX_STAGING_RECORDS, Budget, HostBudget, LayerExperts, ModelMemory, divide, divide_host
from .reservations import Room


@dataclass(frozen=True)
class MemoryDemand:
    """Everything of one model that takes memory, and the sizes that memory must be reserved for.

    Attributes:
        footprint: Bytes that the model needs in addition to its expert slots.
        layouts: Record layout of each layer with routed experts.
        num_experts: Number of routed experts of each of these layers.
        num_experts_per_tok: K; each layer gets at least as many slots.
        prefill_step_size: Number of tokens in the largest forward pass that memory is reserved for.
        max_context: Length of the longest sequence, in tokens.
        limit_name: Argument of load that sets the limit.
    """

    footprint: ModelMemory
    layouts: Mapping[int, RecordLayout]
    num_experts: Mapping[int, int]
    num_experts_per_tok: int
    prefill_step_size: int
    max_context: int
    limit_name: str = "memory_limit"

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        footprint: ModelMemory,
        num_experts_per_tok: int,
        streaming: StreamingConfig,
        num_experts: Mapping[int, int] | None = None,
    ) -> "MemoryDemand":
        """Collect the demand from a checkpoint's headers, a model's memory and load's arguments.

        Args:
            checkpoint: The checkpoint.
            footprint: Memory that the model needs in addition to its expert slots.
            num_experts_per_tok: Number of experts per token, K.
            streaming: The arguments of load.
            num_experts: Number of experts per layer to read in this process; None means all of them.
        """
        layers = checkpoint.moe_layers
        return cls(
            footprint,
            {layer: checkpoint.layout(layer) for layer in layers},
            num_experts or {layer: checkpoint.num_experts(layer) for layer in layers},
            num_experts_per_tok,
            streaming.prefill_step_size,
            streaming.max_context,
        )

    def divide(
        self, limit_bytes: int, io_buffer_bytes: int, room: Room | None = None, reserved_bytes: int = 0
    ) -> Budget:
        """Divide a limit.

        Args:
            limit_bytes: The limit.
            io_buffer_bytes: Size of the buffers for direct reads.
            room: States and scratch to reserve; None is one pass of the largest size and one sequence.
            reserved_bytes: Size of the snapshots to reserve memory for.

        Raises:
            MemoryLimitError: If the limit is too small; names the smallest limit that works.
        """
        return divide(
            limit_bytes,
            self.footprint,
            {
                layer: LayerExperts(layout.record_bytes, self.num_experts[layer])
                for layer, layout in self.layouts.items()
            },
            min_slots=self.num_experts_per_tok,
            batch=room.batch if room else 1,
            tokens=room.tokens if room else self.prefill_step_size,
            length=room.length if room else self.max_context,
            io_buffer_bytes=io_buffer_bytes,
            reserved_bytes=reserved_bytes + (room.more_bytes if room else 0),
            limit_name=self.limit_name,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """A memory limit, its division, and the way experts are read within it.

    Attributes:
        demand: The model's demand.
        limit_bytes: The limit.
        reads: The way experts are read.
        budget: Division of the limit once the model is loaded.
        host: Division of the host's memory, if ``limit_bytes`` and ``budget`` concern a GPU's own memory; None if
            kernels read the host's.
    """

    demand: MemoryDemand
    limit_bytes: int
    reads: Reads
    budget: Budget
    host: HostBudget | None = None

    @classmethod
    def make_for_gpu(
        cls,
        gpu_limit_bytes: int,
        host_limit_bytes: int,
        demand: MemoryDemand,
        checkpoint: Checkpoint,
        io: str,
        *,
        probe: bool = True,
    ) -> "MemoryPlan":
        """Divide two limits: on a GPU's own memory, and on the host's, which experts come from.

        Args:
            gpu_limit_bytes: The limit on the GPU's memory: weights, slots, caches, states and scratch.
            host_limit_bytes: The limit on the host's memory: mapped and pinned files, or buffers.
            demand: The model's demand.
            checkpoint: Checkpoint whose files hold the experts.
            io: The ``io`` argument of load; with "auto", files are mapped and pinned if they fit into host memory.
            probe: Whether to find the number of I/O threads by briefly probing the files, if it isn't remembered.

        Raises:
            MemoryLimitError: If one limit is too small; names the argument and the smallest limit that works.
        """
        demand = replace(demand, limit_name="gpu_memory_limit")
        budget = demand.divide(gpu_limit_bytes, 0)
        records = {layer: layout.record_bytes for layer, layout in demand.layouts.items()}
        expert_bytes = sum(n * records[layer] for layer, n in demand.num_experts.items())
        files = checkpoint.expert_files

        def divided(reads: Reads) -> HostBudget:
            return divide_host(
                host_limit_bytes,
                file_bytes=sum(path.stat().st_size for path in files) if io == "auto" else 0,
                record_bytes=max(records.values()),
                load_bytes=demand.footprint.load_bytes,
                io_buffer_bytes=reads.buffer_bytes,
                min_records=min(demand.num_experts_per_tok, MAX_STAGING_RECORDS),
            )

        if io != "auto":
            reads = Reads(io, "as asked for")
            return cls(demand, gpu_limit_bytes, reads, budget, divided(reads))
        reads = Reads("pread", "host memory has room for all files with experts: mapped and pinned")
        host = divided(reads)
        if not host.mapped_bytes:
            reads = choose_io(files, expert_bytes, budget.slot_bytes, host_limit_bytes, usable_memory_bytes())
            if reads.io == "direct" and probe:
                reads = reads.with_threads(choose_threads(files, max(records.values()), expert_bytes))
            try:
                host = divided(reads)
            except MemoryLimitError:
                reads = Reads("pread", "the limit has no room for the buffers of direct reads")
        return cls(demand, gpu_limit_bytes, reads, budget, host)

    @classmethod
    def make(
        cls, limit_bytes: int, demand: MemoryDemand, checkpoint: Checkpoint, io: str, *, probe: bool = True
    ) -> "MemoryPlan":
        """Decide how experts are read, and divide the limit.

        Args:
            limit_bytes: The limit.
            demand: The model's demand.
            checkpoint: Checkpoint whose files hold the experts.
            io: The ``io`` argument of load; "auto" is resolved here.
            probe: Whether to find the number of I/O threads by briefly probing the files, if it isn't remembered.

        Raises:
            MemoryLimitError: If the limit is too small; names the smallest limit that works.
        """
        if io != "auto":
            return cls._with_reads(limit_bytes, demand, Reads(io, "as asked for"))
        # Buffers of direct reads take only a few megabytes, so the choice ignores them.
        buffered = cls._with_reads(limit_bytes, demand, Reads("pread", ""))
        expert_bytes = sum(n * demand.layouts[layer].record_bytes for layer, n in demand.num_experts.items())
        files = checkpoint.expert_files
        reads = choose_io(files, expert_bytes, buffered.budget.slot_bytes, limit_bytes, usable_memory_bytes())
        if reads.io == "direct":
            if probe:
                largest = max(layout.record_bytes for layout in demand.layouts.values())
                reads = reads.with_threads(choose_threads(files, largest, expert_bytes))
            try:
                return cls._with_reads(limit_bytes, demand, reads)
            except MemoryLimitError:
                reads = Reads("pread", "the limit has no room for the buffers of direct reads")
        return cls(demand, limit_bytes, reads, buffered.budget)

    @classmethod
    def _with_reads(cls, limit_bytes: int, demand: MemoryDemand, reads: Reads) -> "MemoryPlan":
        return cls(demand, limit_bytes, reads, demand.divide(limit_bytes, reads.buffer_bytes))

    def divide(self, limit_bytes: int, room: Room, reserved_bytes: int) -> Budget:
        """Divide a limit by the plan's rules, for the current needs of passes and conversations.

        Raises:
            MemoryLimitError: If the limit is too small; names the smallest limit that works.
        """
        io_buffer_bytes = (
            self.reads.buffer_bytes if self.host is None else 0
        )  # with a host budget, they are in the other memory
        return self.demand.divide(limit_bytes, io_buffer_bytes, room, reserved_bytes)
