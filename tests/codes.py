"""The codes and messages of rejections and badges: the one table for all tests."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["BADGES", "MESSAGES", "SQLSTATES", "WATCHING"]

#: The code in DETAIL to the SQLSTATE.
SQLSTATES: Mapping[str, str] = {
    "cloud_active": "WX001",
    "cooling_down": "WX002",
    "takeover_unconfirmed": "WX003",
    "not_holder": "WX004",
    "wrong_identity": "WX005",
    "provenance_immutable": "WX006",
    "handover_draining": "WX007",
    "append_only": "WX008",
}

#: The messages of the rejections that depend on the lease alone.
MESSAGES: Mapping[str, str] = {
    "cloud_active": "a healthy cloud machine is active for this user",
    "cooling_down": "the cloud machine left running too recently",
    "takeover_unconfirmed": "the cloud machine failed and the takeover is not confirmed",
    "not_holder": "this machine does not hold the lease of the user, or its heartbeat is stale",
}

#: What ``arbiter.status`` says in ``message``; None while the browser may write.
BADGES: Mapping[str | None, str] = {
    "cloud_active": "Cloud active",
    "cooling_down": "Cooling down",
    "takeover_unconfirmed": "Cloud failed",
    None: "Browser mode",
}

#: What it says while every protected table is only observed.
WATCHING = "Watching"
