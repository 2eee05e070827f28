"""Per user, browser xor cloud: PostgreSQL decides, in the transaction of each write.

All rules live in the database (schema `arbiter`); this package installs it and is a thin, typed
client. Only `install`, `uninstall` and the command line take a connection string, everything else
takes your own `psycopg.Connection` and neither opens, commits nor closes it.
"""

from ._version import __version__
from .adoption import Adoption, PlanLine
from .api import (
    Audit,
    Finding,
    Handover,
    Observation,
    ObservedTable,
    Status,
    audit,
    confirm_takeover,
    handovers,
    heartbeat,
    lost_protections,
    observations,
    observed_tables,
    protect,
    protected_tables,
    register_machines,
    status,
    unprotect,
    version,
)
from .errors import (
    AppendOnly,
    ArbiterError,
    CloudActive,
    CoolingDown,
    HandoverDraining,
    InstallError,
    NotHolder,
    OutdatedSchema,
    ProvenanceImmutable,
    TakeoverUnconfirmed,
    WrongIdentity,
    from_psycopg,
    translated,
)
from .install import check_version, finish, install, plan, sql_text, summary, uninstall
from .machine import Machine

__all__ = [
    "Adoption",
    "AppendOnly",
    "ArbiterError",
    "Audit",
    "CloudActive",
    "CoolingDown",
    "Finding",
    "Handover",
    "HandoverDraining",
    "InstallError",
    "Machine",
    "NotHolder",
    "Observation",
    "ObservedTable",
    "OutdatedSchema",
    "PlanLine",
    "ProvenanceImmutable",
    "Status",
    "TakeoverUnconfirmed",
    "WrongIdentity",
    "__version__",
    "audit",
    "check_version",
    "confirm_takeover",
    "finish",
    "from_psycopg",
    "handovers",
    "heartbeat",
    "install",
    "lost_protections",
    "observations",
    "observed_tables",
    "plan",
    "protect",
    "protected_tables",
    "register_machines",
    "sql_text",
    "status",
    "summary",
    "translated",
    "uninstall",
    "unprotect",
    "version",
]
