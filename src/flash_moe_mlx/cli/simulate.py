"""``flash-moe simulate``: replay recorded routing through eviction policies and numbers of slots."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, MaxContext, print_json
from .tables import print_table


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace file written by flash-moe trace.")],
    policy: Annotated[list[str], typer.Option(help="lfu, lru or belady; may be repeated.")] = ["lfu"],  # noqa: B006
    slots: Annotated[list[int] | None, typer.Option(help="Expert slots per layer; may be repeated.")] = None,
    memory_limit: Annotated[
        list[str] | None,
        typer.Option(help='With --model: a memory limit, such as "8GB", instead of --slots; may be repeated.'),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model whose speed to predict at each hit rate. Default: none.")
    ] = None,
    max_context: MaxContext = 8192,
    disk_rate: Annotated[
        str | None, typer.Option(help='With --model: disk bytes per second, such as "3GB". Default: probe the disk.')
    ] = None,
    hosts: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of hosts that share the experts; may be repeated. Predicts speed from the times below.",
            rich_help_panel="Several hosts",
        ),
    ] = None,
    link_us: Annotated[
        float, typer.Option(help="Microseconds per message between two hosts.", min=0, rich_help_panel="Several hosts")
    ] = 40.0,
    read_us: Annotated[
        float, typer.Option(help="Microseconds per expert read by a host.", min=0, rich_help_panel="Several hosts")
    ] = 1000.0,
    layer_us: Annotated[
        float, typer.Option(help="Microseconds per layer without its reads.", min=0, rich_help_panel="Several hosts")
    ] = 300.0,
    replicas: Annotated[
        int,
        typer.Option(help="Hottest experts per layer that every host keeps.", min=0, rich_help_panel="Several hosts"),
    ] = 0,
    json: Json = False,
) -> None:
    """Predict recorded routing's hit rate at other memory limits.

    Compares eviction policies. With --model, predicts its decode speed at each hit rate too. With --hosts, predicts
    decode over hosts that share the experts, placed by number and by heat; each host has the given slots.

    Examples:
        flash-moe simulate routing.npz --slots 4 --slots 8 --policy lfu --policy lru --policy belady
        flash-moe simulate routing.npz --slots 16 --hosts 1 --hosts 2 --hosts 8 --link-us 20
    """
    from ..errors import RequestError
    from ..experts.trace import RoutingTrace
    from ..planning.simulation import replay

    routing = RoutingTrace.read(trace)
    if memory_limit and model is None:
        raise RequestError("[simulate] --memory-limit needs --model, got none. Name it, or use --slots.")
    shares: list[tuple[str, Any]] = [(str(n), n) for n in slots or ()]
    planner = None
    if model is not None:
        from ..config import parse_size
        from ..planning.planner import Planner

        planner = Planner.open(
            model,
            max_context=max_context,
            disk_bytes_per_second=None if disk_rate is None else parse_size(disk_rate, "disk_rate"),
        )
        shares += [(limit, planner.divide(parse_size(limit)).num_slots) for limit in memory_limit or ()]
    if not shares:
        every = routing.num_experts
        least = routing.experts.shape[2]
        shares = [(str(n), n) for n in sorted({max(least, every * part // 8) for part in (1, 2, 4, 6, 8)})]
    if hosts:
        _print_hosts(routing, hosts, shares, (link_us, read_us, layer_us, replicas), json)
        return
    results: list[dict[str, Any]] = []
    for name, num_slots in shares:
        for kind in policy:
            found = replay(routing, num_slots, kind)
            results.append(
                {
                    "slots": name,
                    "policy": kind,
                    "hit_rate": found.hit_rate,
                    "decode_hit_rate": found.decode_hit_rate,
                    "misses_per_token": found.decode_misses_per_token,
                    "tokens_per_second": planner and planner.tokens_per_second(found.decode_hit_rate),
                }
            )
    if json:
        print_json({"trace": str(trace), "tokens": len(routing.phase), "results": results})
        return
    head = ["slots", "policy", "hit rate", "decode hit rate", "misses per token", *(["tok/s"] if planner else [])]
    rows = [
        [
            r["slots"],
            r["policy"],
            f"{r['hit_rate']:.1%}",
            f"{r['decode_hit_rate']:.1%}",
            f"{r['misses_per_token']:.1f}",
            *([f"{r['tokens_per_second']:.2f}" if r["tokens_per_second"] else ""] if planner else []),
        ]
        for r in results
    ]
    print_table(head, rows, right={*head} - {"policy"})


def _print_hosts(
    routing: Any, hosts: list[int], shares: list[tuple[str, Any]], times: tuple[float, float, float, int], json: bool
) -> None:
    from ..errors import RequestError
    from ..planning.hosts import replay_hosts

    link_us, read_us, layer_us, replicas = times
    results: list[dict[str, Any]] = []
    for name, slots in shares:
        if not isinstance(slots, int):
            raise RequestError("[simulate] --hosts must come with --slots, got --memory-limit. Name the slots.")
        for count in hosts:
            for placement in ("number", "heat"):
                found = replay_hosts(
                    routing,
                    count,
                    slots,
                    read_us=read_us,
                    layer_us=layer_us,
                    link_us=link_us,
                    by_heat=placement == "heat",
                    replicas=replicas,
                )
                results.append(
                    {
                        "slots": name,
                        "hosts": count,
                        "placement": placement,
                        "hit_rate": found.hit_rate,
                        "longest_reads_per_token": found.longest_reads,
                        "tokens_per_second": found.tokens_per_second,
                    }
                )
    if json:
        print_json({"results": results})
        return
    head = ["slots", "hosts", "placed by", "hit rate", "longest reads per token", "tok/s"]
    rows = [
        [
            r["slots"],
            str(r["hosts"]),
            r["placement"],
            f"{r['hit_rate']:.1%}",
            f"{r['longest_reads_per_token']:.1f}",
            f"{r['tokens_per_second']:.2f}",
        ]
        for r in results
    ]
    print_table(head, rows, right={*head} - {"placed by"})
