"""What a run of benchmarks/serving.py says: medians per server, the bars and whether they are met, as markdown."""

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PEERS = ("mosec", "triton", "fastapi")
QUICK = "python benchmarks/serving.py"
RAW_SHARE = 0.88
ONE_CLIENT_MS = 0.25
MODE_SHARES = {
    "modes:random": ("random, a path per image, of single", 0.90),
    "modes:random-batch": ("random, a path per batch, of single", 0.97),
    "modes:int8": ("int8 of fp32", 1.7),
}
PREFIX_COSTS = {4: 2.6, 8: 4.7}
RESIDENT_MB, GROWTH = 150, 5
START_SECONDS, INSTALL_MB = 1.5, 300

Cells = Sequence[Mapping[str, Any]]
Row = tuple[str, str, str, str, str]


def summary(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry per server and number of clients: medians over the rounds, and their spread."""
    keys = list(dict.fromkeys((cell["server"], cell["clients"]) for cell in document["cells"]))
    found = []
    for server, clients in keys:
        cells = _cells(document, server, clients)
        rates = [cell["per_second"] for cell in cells]
        middle = {
            key: statistics.median(cell[key] for cell in cells)
            for key in ("per_second", "p50_ms", "p99_ms", "ratio", "processor_ratio", "cpu_ms_each")
        }
        found.append(
            {
                "server": server,
                "clients": clients,
                **{key: round(value, 4) for key, value in middle.items()},
                "spread": round((max(rates) - min(rates)) / statistics.median(rates), 3),
                "rounds": len(cells),
                "quiet": all(cell["quiet"] for cell in cells),
            }
        )
    return found


def markdown(document: Mapping[str, Any]) -> str:
    """Return the bars, the servers and the rest of a run as tables."""
    parts = [_title(document), _table(("bar", "wanted", "measured", "met", "command"), bars(document))]
    rows = [_server_row(entry) for entry in summary(document)]
    if rows:
        head = ("server", "clients", "requests/s", "p50 ms", "p99 ms", "of raw", "by processor time", "spread")
        parts.append(_table(head, rows))
    notes = [f"- `{name}`: {about['about']}; {_held(about)}" for name, about in document["servers"].items()]
    notes += [
        f"- not measured, {name}: {' '.join(reason.split())[:200]}" for name, reason in document["skipped"].items()
    ]
    raw = document["raw"]
    if "rounds" in raw:
        rates = [cell["per_second"] for cell in raw["rounds"]]
        notes.append(
            f"- raw ONNX Runtime: median {statistics.median(rates):.0f} images/s "
            f"({min(rates):.0f} to {max(rates):.0f}), "
            f"batch {raw['arrangement']['batch']}, {raw['arrangement']['sessions']} session(s)"
        )
    noisy = sum(not cell["quiet"] for cell in [*document["cells"], *raw.get("rounds", []), *raw.get("lone", [])])
    notes.append(f"- {noisy} measurements with more than a quarter of a core used by others")
    if any(not entry["quiet"] for entry in summary(document)):
        notes.append("- `*`: of these at least one round was disturbed")
    parts.append("\n".join(notes) + "\n")
    return "\n".join(parts)


def bars(document: Mapping[str, Any]) -> list[Row]:
    """Return what was wanted and what was measured: bar, wanted, measured, met or not (- if unknown), command.

    `(disturbed)` marks a verdict that rests on cells in which other processes used the machine: it is worth little.
    """
    peers = [name for name in PEERS if any(name == cell["server"] for cell in document["cells"])]
    rows = [_share_of_raw(document, clients) for clients in (32, 128)]
    rows += [_above_peers(document, peers, clients) for clients in (32, 128)]
    rows += [_p99(document, peers), _one_client(document)]
    rows += [_mode(document, name) for name in MODE_SHARES]
    rows += [_prefixes(document, members) for members in PREFIX_COSTS]
    return rows + _whole_process(document)


def _share_of_raw(document: Mapping[str, Any], clients: int) -> Row:
    command = f"{QUICK} --only ours,raw --clients {clients}"
    quiet = _quiet(document, clients, "ours")
    measured = _median(document, "ours", clients, "ratio")
    return _row(f"of raw ONNX Runtime, {clients} clients", "≥", RAW_SHARE, measured, command, quiet=quiet)


def _above_peers(document: Mapping[str, Any], peers: Sequence[str], clients: int) -> Row:
    """Compare with each peer, round by round; the one that comes closest counts."""
    command = f"{QUICK} --only ours,raw,peers --clients {clients}"
    ratios = {name: _ratio(document, "ours", name, clients) for name in peers}
    known = sorted((ratio, name) for name, ratio in ratios.items() if ratio is not None)
    measured, note = None, ""
    if known:
        measured, name = known[0]
        note = f" of {name}" + _missing([name for _, name in known])
    quiet, complete = _quiet(document, clients, "ours", *peers), len(known) == len(PEERS)
    bar = f"above every peer, {clients} clients"
    return _row(bar, ">", 1, measured, command, note=note, quiet=quiet, complete=complete)


def _p99(document: Mapping[str, Any], peers: Sequence[str]) -> Row:
    command = f"{QUICK} --only ours,raw,peers --clients 32"
    ours = _median(document, "ours", 32, "p99_ms")
    theirs = {name: _median(document, name, 32, "p99_ms") for name in peers}
    known = sorted((value, name) for name, value in theirs.items() if value is not None)
    measured, note = None, ""
    if ours is not None and known:
        best, name = known[0]
        measured = ours / best
        note = f" of {name} ({ours:.2f} ms against {best:.2f} ms)" + _missing([name for _, name in known])
    quiet, complete = _quiet(document, 32, "ours", *peers), len(known) == len(PEERS)
    bar = "p99 below every peer's, 32 clients"
    return _row(bar, "<", 1, measured, command, note=note, quiet=quiet, complete=complete)


def _one_client(document: Mapping[str, Any]) -> Row:
    command = f"{QUICK} --only ours,raw --clients 1"
    ours, lone = _median(document, "ours", 1, "p50_ms"), document["raw"].get("lone", [])
    measured, note = None, ""
    if ours is not None and lone:
        raw = statistics.median(cell["p50_ms"] for cell in lone)
        measured, note = ours - raw, f" ({ours:.3f} against {raw:.3f})"
    quiet = _quiet(document, 1, "ours") and all(cell["quiet"] for cell in lone)
    bar = "p50 at 1 client above raw's at batch 1 on all cores"
    return _row(bar, "≤", ONE_CLIENT_MS, measured, command, unit=" ms", note=note, quiet=quiet)


def _mode(document: Mapping[str, Any], name: str) -> Row:
    label, share = MODE_SHARES[name]
    counts = [cell["clients"] for cell in document["cells"] if cell["server"] == name]
    clients = counts[0] if counts else 32
    quiet = _quiet(document, clients, name, "modes:single")
    command = f"{QUICK} --only raw,modes:single,{name}"
    measured = _ratio(document, name, "modes:single", clients)
    return _row(f"{label}, {clients} clients", "≥", share, measured, command, quiet=quiet)


def _prefixes(document: Mapping[str, Any], members: int) -> Row:
    part = document.get("prefixes", {})
    costs, quiet = part.get("costs", {}), part.get("measured", {}).get("quiet", True)
    disjoint, drawn = costs.get(f"{members} disjoint"), costs.get(f"{members} drawn")
    note = "" if drawn is None else f" (nothing else in common; {drawn:.3g} if drawn at random)"
    bar = f"ensemble of {members} paths with half in common, batch 32, of one path's time"
    return _row(bar, "≤", PREFIX_COSTS[members], disjoint, f"{QUICK} --only prefixes", note=note, quiet=quiet)


def _whole_process(document: Mapping[str, Any]) -> list[Row]:
    memory, start, install = (document.get(part, {}) for part in ("memory", "start", "install"))
    if len(memory.get("modes", ())) < 2:  # what one mode holds says nothing of all
        memory = {}
    note = f" at most ({memory['resident_mb']:.0f} after the warm-up; {', '.join(memory['modes'])})" if memory else ""
    highest, grown = memory.get("highest_resident_mb"), memory.get("growth")
    grown = None if grown is None else 100 * grown
    command = f"{QUICK} --only memory"
    return [
        _row("resident, all modes loaded", "<", RESIDENT_MB, highest, command, unit=" MB", note=note),
        _row("growth over 100 000 requests", "≤", GROWTH, grown, command, unit=" %"),
        _row("start to first answer", "<", START_SECONDS, start.get("median"), f"{QUICK} --only start", unit=" s"),
        _row(
            "installed extra serve-cpu",
            "<",
            INSTALL_MB,
            install.get("megabytes"),
            f"{QUICK} --only install",
            unit=" MB",
        ),
    ]


def _row(
    bar: str,
    sign: str,
    limit: float,
    measured: float | None,
    command: str,
    *,
    unit: str = "",
    note: str = "",
    quiet: bool = True,
    complete: bool = True,
) -> Row:
    """Return a row of the bars; `sign` is how the number should compare with the limit, incomplete ones meet none."""
    wanted = f"{sign} {limit:g}{unit}"
    if measured is None:
        return bar, wanted, "-", "-", f"`{command}`"
    met = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}[sign](measured, limit)
    verdict = "no" if not met else "yes" if complete else "-"
    verdict += "" if quiet else " (disturbed)"
    return bar, wanted, f"{measured:.3g}{unit}{note}", verdict, f"`{command}`"


def _missing(measured: Sequence[str]) -> str:
    absent = [name for name in PEERS if name not in measured]
    return f"; not measured: {', '.join(absent)}" if absent else ""


def _quiet(document: Mapping[str, Any], clients: int, *names: str) -> bool:
    return all(cell["quiet"] for name in names for cell in _cells(document, name, clients))


def _cells(document: Mapping[str, Any], server: str, clients: int) -> Cells:
    return [cell for cell in document["cells"] if (cell["server"], cell["clients"]) == (server, clients)]


def _median(document: Mapping[str, Any], server: str, clients: int, key: str) -> float | None:
    cells = _cells(document, server, clients)
    return statistics.median(cell[key] for cell in cells) if cells else None


def _ratio(document: Mapping[str, Any], server: str, other: str, clients: int) -> float | None:
    """Return the median over the rounds of one server's rate to another's in the same round."""
    rates = [
        {cell["round"]: cell["per_second"] for cell in _cells(document, name, clients)} for name in (server, other)
    ]
    both = [rates[0][number] / rates[1][number] for number in rates[0] if number in rates[1]]
    return statistics.median(both) if both else None


def _server_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{entry['server']}{'' if entry['quiet'] else ' *'}",
        str(entry["clients"]),
        f"{entry['per_second']:.0f}",
        f"{entry['p50_ms']:.2f}",
        f"{entry['p99_ms']:.2f}",
        f"{entry['ratio']:.3f}",
        f"{entry['processor_ratio']:.3f}",
        f"{100 * entry['spread']:.1f} %",
    )


def _held(server: Mapping[str, Any]) -> str:
    return (
        f"{server['resident_mb']:.0f} MB resident, {server['pss_mb']:.0f} MB PSS in {server['processes']} process(es)"
    )


def _title(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"{document['processor']}, {document['cores']} cores; {versions}; {document['date']}; median of "
        f"{document['rounds']} rounds of {document['seconds_per_cell']:g} s; models {document['plain_model']}, "
        f"{document['gated_model']} (modes).\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(head), line(["---"] * len(head)), *(line(row) for row in rows)]) + "\n"
