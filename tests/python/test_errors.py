"""What a rejection looks like in Python: class, attributes, and that nothing else is touched."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import arbiter_db
from arbiter_db import ArbiterError, errors

if TYPE_CHECKING:
    from conftest import Database

USER = "ada00000-0000-4000-8000-000000000001"
MACHINE = "ada00000-0000-4000-8000-0000000000c1"

CLASSES = {
    "WX001": ("cloud_active", arbiter_db.CloudActive),
    "WX002": ("cooling_down", arbiter_db.CoolingDown),
    "WX003": ("takeover_unconfirmed", arbiter_db.TakeoverUnconfirmed),
    "WX004": ("not_holder", arbiter_db.NotHolder),
    "WX005": ("wrong_identity", arbiter_db.WrongIdentity),
    "WX006": ("provenance_immutable", arbiter_db.ProvenanceImmutable),
    "WX007": ("handover_draining", arbiter_db.HandoverDraining),
    "WX008": ("append_only", arbiter_db.AppendOnly),
}

RAISE = """
do $do$
begin
  raise exception using
    errcode = '{sqlstate}', message = 'no', detail = $detail${detail}$detail$, hint = 'do that';
end
$do$
"""


def rejection(conn: psycopg.Connection[Any], sqlstate: str, detail: str) -> psycopg.Error:
    """The exception that psycopg makes of an error the server raises."""
    statement = RAISE.format(sqlstate=sqlstate, detail=detail)
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(statement.encode())
    return caught.value


@pytest.mark.parametrize("sqlstate", CLASSES)
def test_each_code_has_a_class_with_everything_the_database_said(
    bare_db: Database, sqlstate: str
) -> None:
    code, cls = CLASSES[sqlstate]
    detail = {
        "code": code,
        "user_id": str(USER),
        "holder": "cloud",
        "machine_id": str(MACHINE),
        "epoch": 7,
        "retry_at": "2026-01-02T03:04:05.678901Z",
        "more": [1],
    }

    error = errors.from_psycopg(rejection(bare_db.connect(), sqlstate, json.dumps(detail)))

    assert type(error) is cls
    assert str(error) == "no"
    assert (error.code, error.sqlstate, error.hint) == (code, sqlstate, "do that")
    assert (error.user_id, error.machine_id) == (USER, MACHINE)
    assert (error.holder, error.epoch) == ("cloud", 7)
    assert error.retry_at == datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    assert error.detail == detail
    assert error.diag.message_hint == "do that"


def test_the_classes_are_those_of_the_database(db: Database) -> None:
    conn = db.connect()
    for sqlstate, (code, cls) in CLASSES.items():
        row = conn.execute("select (arbiter._rejection(%s)).sqlstate", (code,)).fetchone()
        assert row == (sqlstate,)
        assert (cls.sqlstate, cls.code) == (sqlstate, code)


def test_what_the_database_leaves_open_is_none(bare_db: Database) -> None:
    detail = json.dumps({"code": "wrong_identity", "user_id": None, "retry_at": None})

    error = errors.from_psycopg(rejection(bare_db.connect(), "WX005", detail))

    assert error is not None
    assert [error.user_id, error.holder, error.machine_id, error.epoch, error.retry_at] == [
        None
    ] * 5


@pytest.mark.parametrize(
    "detail",
    ["", "not json", "[1]", '{"epoch": [], "user_id": 3, "machine_id": {}, "retry_at": "soon"}'],
)
def test_an_odd_detail_is_still_a_rejection(bare_db: Database, detail: str) -> None:
    error = errors.from_psycopg(rejection(bare_db.connect(), "WX002", detail))

    assert type(error) is arbiter_db.CoolingDown
    assert error.code == "cooling_down"
    assert [error.user_id, error.machine_id, error.epoch, error.retry_at] == [None] * 4


def test_a_code_of_a_newer_database_is_a_plain_arbiter_error(bare_db: Database) -> None:
    detail = json.dumps({"code": "brand_new"})

    error = errors.from_psycopg(rejection(bare_db.connect(), "WX099", detail))

    assert type(error) is ArbiterError
    assert (error.sqlstate, error.code) == ("WX099", "brand_new")


def test_other_errors_are_left_alone(bare_db: Database) -> None:
    assert errors.from_psycopg(rejection(bare_db.connect(), "23505", "")) is None
    assert errors.from_psycopg(psycopg.OperationalError("gone")) is None
    assert errors.from_psycopg(ValueError("no")) is None


def test_a_rejection_survives_pickling(bare_db: Database) -> None:
    detail = json.dumps({"code": "not_holder", "user_id": str(USER), "epoch": 3})
    error = errors.from_psycopg(rejection(bare_db.connect(), "WX004", detail))

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is arbiter_db.NotHolder
    assert str(again) == "no"
    assert (again.user_id, again.epoch, again.hint) == (USER, 3, "do that")
    assert again.diag.sqlstate == "WX004"


def test_translated_raises_the_class_and_the_transaction_is_rolled_back(bare_db: Database) -> None:
    conn = bare_db.connect()
    conn.execute("create table t (x int)")
    statement = RAISE.format(sqlstate="WX001", detail="{}").encode()

    def write() -> None:
        with arbiter_db.translated(), conn.transaction():
            conn.execute("insert into t values (1)")
            conn.execute(statement)

    with pytest.raises(arbiter_db.CloudActive) as caught:
        write()

    assert isinstance(caught.value, psycopg.DatabaseError)
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert conn.execute("select count(*) from t").fetchone() == (0,)


def test_translated_lets_everything_else_through(bare_db: Database) -> None:
    conn = bare_db.connect()
    with pytest.raises(psycopg.errors.DivisionByZero), arbiter_db.translated():
        conn.execute("select 1 / 0")
    with pytest.raises(KeyError), arbiter_db.translated():
        raise KeyError
    original = arbiter_db.CloudActive("no")
    with pytest.raises(arbiter_db.CloudActive) as caught, arbiter_db.translated():
        raise original
    assert caught.value is original
    assert caught.value.__cause__ is None


def test_a_rejection_that_nobody_has_filled_in_says_nothing() -> None:
    error = ArbiterError("no")
    names = ("code", "user_id", "holder", "machine_id", "epoch", "retry_at", "hint", "sqlstate")
    assert {name: getattr(error, name) for name in names} == dict.fromkeys(names)
    assert error.detail == {}
    assert ArbiterError("no").detail is not error.detail


def test_a_time_without_a_zone_is_utc(bare_db: Database) -> None:
    detail = json.dumps({"retry_at": "2026-01-02T03:04:05"})
    error = errors.from_psycopg(rejection(bare_db.connect(), "WX002", detail))
    assert error is not None
    assert error.retry_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_installation_errors_say_what_the_database_said() -> None:
    error = arbiter_db.InstallError("no", hint="do that", detail="because", sqlstate="42501")
    assert (str(error), error.hint, error.detail, error.sqlstate) == (
        "no",
        "do that",
        "because",
        "42501",
    )
    plain = arbiter_db.InstallError("no")
    assert [plain.hint, plain.detail, plain.sqlstate] == [None] * 3
    missing = arbiter_db.OutdatedSchema(None, "0.1.0", hint="install")
    assert str(missing) == "arbiter is not installed in this database"
    assert (missing.installed, missing.expected, missing.hint) == (None, "0.1.0", "install")


def test_installation_errors_are_no_rejections() -> None:
    error = arbiter_db.OutdatedSchema("0.0.1", "0.1.0", hint="upgrade")

    assert isinstance(error, arbiter_db.InstallError)
    assert not isinstance(error, psycopg.Error)
    assert (error.installed, error.expected, error.hint) == ("0.0.1", "0.1.0", "upgrade")
    assert str(error) == "this database has arbiter 0.0.1, this package is 0.1.0"
