"""Who can log in to the servers of the demo and the tests: their user alone, and over TCP only who
has the password."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from proof.pgbouncer import PgBouncer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError

MAJOR = int(os.environ.get("PG") or "18")


@pytest.fixture(scope="module")
def listening() -> Iterator[EmbeddedServer]:
    """A server that listens on TCP, with a login besides its superuser."""
    with EmbeddedServer(MAJOR, tcp=True) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute("create role app_owner login; create role group_role nologin")
        yield server


def by_tcp(server: EmbeddedServer, user: str, **parts: str | int | None) -> str:
    """What a stranger on this machine can write down."""
    return make_conninfo("", host="127.0.0.1", port=server.port, user=user, **parts)


@pytest.mark.parametrize("user", ["postgres", "app_owner"])
@pytest.mark.parametrize("password", [None, "", "postgres", "app_owner"])
def test_a_login_over_tcp_without_the_password_is_refused(
    listening: EmbeddedServer, user: str, password: str | None
) -> None:
    """A superuser who can is the account that runs the server: COPY ... TO PROGRAM."""
    listening.conninfo(user=user, tcp=True)
    guess = by_tcp(listening, user, dbname="postgres", password=password)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(guess)


@pytest.mark.parametrize("user", ["postgres", "app_owner"])
def test_its_connection_string_has_the_password(listening: EmbeddedServer, user: str) -> None:
    conninfo = listening.conninfo(user=user, tcp=True)
    with psycopg.connect(conninfo) as conn:
        row = conn.execute("select current_user, host(inet_server_addr())").fetchone()
    assert row == (user, "127.0.0.1")
    password = str(conninfo_to_dict(conninfo)["password"])
    assert len(password) >= 32
    assert "password" not in conninfo_to_dict(listening.conninfo(user=user))
    with psycopg.connect(listening.conninfo()) as conn:
        stored = conn.execute(
            "select rolpassword from pg_authid where rolname = %s", (user,)
        ).fetchone()
    assert stored is not None
    assert stored[0].startswith("SCRAM-SHA-256$")
    assert password not in listening.log_file.read_text("utf-8")


def test_a_password_is_of_one_server_and_one_role(listening: EmbeddedServer) -> None:
    with EmbeddedServer(MAJOR, tcp=True) as other:
        passwords = {
            conninfo_to_dict(server.conninfo(user=user, tcp=True))["password"]
            for server, user in ((other, "postgres"), (listening, "postgres"),
                                 (listening, "app_owner"))
        }  # fmt: skip
    assert len(passwords) == 3


def test_a_password_stays_when_the_server_starts_again(listening: EmbeddedServer) -> None:
    before = listening.conninfo(user="app_owner", tcp=True)
    listening.kill()
    listening.start()
    assert listening.conninfo(user="app_owner", tcp=True) == before
    psycopg.connect(before).close()


def test_a_role_that_cannot_log_in_is_named(listening: EmbeddedServer) -> None:
    with pytest.raises(EmbeddedServerError, match='role "no_such" does not exist'):
        listening.conninfo(user="no_such", tcp=True)


def test_no_address_but_the_loopback_is_let_in(listening: EmbeddedServer) -> None:
    with psycopg.connect(listening.conninfo()) as conn:
        rules = conn.execute(
            "select type, address, auth_method from pg_hba_file_rules where type <> 'local'"
        ).fetchall()
        (addresses,) = conn.execute("show listen_addresses").fetchone() or (None,)
    assert addresses == "127.0.0.1"
    assert {address for _, address, _ in rules} <= {"127.0.0.1", "::1"}
    assert {method for *_, method in rules} == {"scram-sha-256"}


def test_only_its_user_reaches_the_socket(server: EmbeddedServer) -> None:
    """The directory keeps others out, and so does the socket itself."""
    owner = Path(server.host).stat()
    socket = (Path(server.host) / f".s.PGSQL.{server.port}").stat()
    assert stat.S_IMODE(owner.st_mode) == 0o700
    assert stat.S_IMODE(socket.st_mode) & 0o077 == 0
    assert stat.S_IMODE(server.data_directory.stat().st_mode) & 0o077 == 0
    assert owner.st_uid == socket.st_uid == server.data_directory.stat().st_uid


def test_the_pooler_is_on_a_socket_alone(server: EmbeddedServer) -> None:
    """It lets every user in without a password, so no other user may reach it."""
    with PgBouncer(server) as bouncer:
        with psycopg.connect(bouncer.conninfo(), prepare_threshold=None) as conn:
            assert conn.execute("select 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(bouncer.conninfo(), host="127.0.0.1", connect_timeout=2)
        socket = Path(bouncer.host) / f".s.PGSQL.{bouncer.port}"
        assert stat.S_IMODE(Path(bouncer.host).stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0


def test_a_name_is_quoted(listening: EmbeddedServer) -> None:
    name = 'app"; alter role app_owner superuser; --'
    with psycopg.connect(listening.conninfo(), autocommit=True) as conn:
        conn.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
    with psycopg.connect(listening.conninfo("postgres", name, tcp=True)) as conn:
        assert conn.execute("select current_user").fetchone() == (name,)
