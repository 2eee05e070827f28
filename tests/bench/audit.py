"""What an audit costs: ten million rows, a million handovers, and smaller sizes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from bench.load import BenchError
from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import Stage, load_sql
from bench.together import Together, connect, database, install, make_app, run_script

__all__ = ["COMPARISONS"]

SQL = load_sql("audit.sql")

GROUP = Group("The audit: server CPU per row, by size, as a multiple of the smallest")

#: Smaller sizes have fewer users; each user's history is as long as at full size.
SIZES = (100_000, 1_000_000, 10_000_000)
EPOCHS = 100
ROWS_PER_EPOCH = 10
#: The epoch of the planted row: a machine holds it, in the middle of the history.
PLANTED_EPOCH = 50


TITLES = {"audit": "audit", "audit_verbose": "audit that counts the proved and says how far it is"}


def _play(stage: Stage, plan: Plan, on_round: Callable[[], None]) -> dict[str, Samples]:
    """Both audits once at each size, on a history that holds together, and once more with one row
    of the wrong environment in it, which must be found."""
    largest = max(EPOCHS * ROWS_PER_EPOCH * 10, int(SIZES[-1] * plan.scale))
    sizes = sorted({min(size, largest) for size in SIZES})
    labels = tuple(f"{size:,} rows" for size in sizes)
    samples = {name: Samples(title, "us", labels) for name, title in TITLES.items()}
    for size, label in zip(sizes, labels, strict=True):
        with database(stage, f"bench_audit_{size}") as conninfo:
            _write_history(conninfo, size // (EPOCHS * ROWS_PER_EPOCH))
            for name, one in samples.items():
                verbose = name == "audit_verbose"
                found, cost = _audited(conninfo, verbose)
                if found != ([("proved", size)] if verbose else []):
                    raise BenchError(f"the audit of a history that holds together found {found}")
                one.rounds[label].append(cost.pop("server CPU, us") / size)
                one.facts[label] = cost | {"rows per second": size / cost["seconds"]}
            _find_planted(conninfo)
        on_round()
    return samples


def _write_history(conninfo: str, users: int) -> None:
    """The holder of each epoch writes its rows, some of them in transactions that were in flight
    when it began."""
    with connect(conninfo) as conn:
        make_app(conn)
        run_script(conn, SQL["people"], users=users)
    install(conninfo)
    with connect(conninfo) as conn, connect(conninfo) as early:
        run_script(conn, SQL["leases"], users=users)
        run_script(conn, SQL["machines"], users=users)
        conn.execute("alter table public.cloud_machines disable trigger user")
        conn.execute(SQL["run"])
        # Without a listener so many notifications would take longer than the handovers.
        conn.execute("alter table arbiter.leases disable trigger user")
        for epoch in range(1, EPOCHS + 1):
            rows = {"users": users, "epoch": epoch, "rows": ROWS_PER_EPOCH}
            with early.transaction():
                early.execute("select pg_current_xact_id()")
                if epoch > 1:
                    run_script(conn, SQL["hand_over"])
                run_script(conn, SQL["write"], early=False, **rows)
                early.execute(SQL["write"], {"early": True, **rows}, prepare=False)
        conn.execute(SQL["keys"])
        conn.execute("vacuum analyze")
        for loader in (conn, early):
            loader.execute(SQL["flush"])


def _audited(conninfo: str, verbose: bool) -> tuple[list[Any], dict[str, float]]:
    """What an audit found and what it cost, in a new session."""
    with connect(conninfo) as conn:
        (spilled,) = _one(conn, SQL["spilled"])
        started = time.perf_counter()
        with cpu_time(conn) as cost:
            found = conn.execute(SQL["audit"], {"verbose": verbose}).fetchall()
        seconds = time.perf_counter() - started
        peak = _peak_memory(conn)
        conn.execute(SQL["flush"])
        (spilled_since,) = _one(conn, SQL["spilled"])
    return found, {
        "server CPU, us": cost.spent,
        "seconds": seconds,
        "peak memory with shared buffers, MB": peak / 1024,
        "temporary files, MB": (spilled_since - spilled) / 1e6,
    }


def _find_planted(conninfo: str) -> None:
    with connect(conninfo) as conn:
        conn.execute("alter table public.signals disable trigger user")
        (planted,) = _one(conn, SQL["plant"], {"epoch": PLANTED_EPOCH})
        found = conn.execute(
            "select finding, reason, row_key ->> 'id', epoch from arbiter.audit('public.signals')"
        ).fetchall()
    if found != [("contradiction", "wrong_environment", planted, PLANTED_EPOCH)]:
        raise BenchError(f"the audit found {found}, where {planted} was planted")


def _one(conn: Conn, query: bytes, values: dict[str, Any] | None = None) -> tuple[Any, ...]:
    (row,) = psycopg.ClientCursor(conn).execute(query, values).fetchall()
    return tuple(row)


def _peak_memory(conn: Conn) -> int:
    """The peak memory of the connection's backend, in kB."""
    status = Path(f"/proc/{conn.info.backend_pid}/status").read_text()
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak)


COMPARISONS: dict[str, Comparison] = Together(_play, GROUP, TITLES).comparisons()
