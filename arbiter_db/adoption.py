"""What an installation adopts, and the plan that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

__all__ = ["Adoption", "PlanLine"]


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """Which tables an installation adopts.

    Without any of these, `public.cloud_machines` becomes the registry and `public.signals` is
    protected, where they exist, fit and leave no doubt; the plan says what was skipped and why.
    What is named here and does not fit is an error.
    """

    #: False: neither of the two by default.
    adopt: bool = True
    #: The table of machines, with its schema. Its columns have the usual names.
    registry: str | None = None
    #: The tables to protect, with their schemas; they take the place of `public.signals`.
    protect: Sequence[str] = ()
    #: For each table that this installation protects, as `protect` takes them.
    user_path: str | None = None
    machine_column: str | None = None
    mode: str | None = None
    unowned: str | None = None

    def as_json(self) -> str:
        """For the setting `arbiter.install_options`: what is not the default."""
        default = asdict(Adoption())
        chosen = {name: value for name, value in asdict(self).items() if value != default[name]}
        return json.dumps(chosen)


@dataclass(frozen=True)
class PlanLine:
    """One line of a plan.

    `step`: `register`, `protect`, `keep` or `skip` a table, or a `note` or `warning` on it.
    `finding`: what is, or will be. `remedy`: what to do about it, if there is something.
    """

    step: str
    table: str
    finding: str
    remedy: str | None
