"""happy-dom, a browser's page for Node: the tests in ``module/`` run arbiter.js on it.

It is the npm package with the one package that it needs, in the user's cache directory, into which
this puts them (nothing is downloaded otherwise)::

    PYTHONPATH=tests/supabase python -m happy_dom fetch
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from arbiter_db.demo.downloads import (
    DownloadError,
    cache_directory,
    npm_pack,
    put,
    unpack,
    work_in,
)

__all__ = ["fetch", "find"]

VERSION = "20.0.11"
PACKAGES = {
    "happy-dom": (
        VERSION,
        "sha512-QsCdAUHAmiDeKeaNojb1OHOPF7NjcWPBR7obdu3NwH2a/oyQaLg5d0aaCy/9My6CdPChYF07dvz5chaXBGaD4g==",
    ),
    "whatwg-mimetype": (
        "3.0.0",
        "sha512-nt+N2dzIutVRxARx1nghPKGv1xHikU7HKdfafKkLNLindmPU/ch3U31NOCGGA/dmPcmb1VlofO0vnKAcsm0o/Q==",
    ),
}
COMMAND = "PYTHONPATH=tests/supabase python -m happy_dom fetch"


def _folder() -> Path:
    return cache_directory() / "npm" / f"happy-dom-{VERSION}"


def find() -> Path:
    """Where the module for ``import`` is; DownloadError when it is not on this machine."""
    module = _folder() / "node_modules" / "happy-dom" / "lib" / "index.js"
    if not module.is_file():
        raise DownloadError(f"happy-dom {VERSION} is not on this machine: {COMMAND}")
    return module


def fetch() -> Path:
    """Make sure that it is there, downloading it if it is not; DownloadError if that fails."""
    if not _folder().is_dir():
        with work_in(_folder().parent) as work:
            modules = work / "made" / "node_modules"
            modules.mkdir(parents=True)
            for name, (version, integrity) in PACKAGES.items():
                packed = work / name
                packed.mkdir()
                archive = npm_pack(name, version, integrity, packed)
                unpack(archive, packed / "unpacked").rename(modules / name)
            put(work / "made", _folder())
    return find()


@click.group(help="happy-dom, for the tests.")
def _cli() -> None:
    pass


@_cli.command("fetch", help="Download it, unless it is on this machine already.")
def _fetch_command() -> None:
    try:
        click.echo(fetch())
    except DownloadError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    _cli(prog_name="python -m happy_dom")
