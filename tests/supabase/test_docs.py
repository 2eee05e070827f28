"""docs/supabase.md as a visitor types it, with the programs that it is about."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from docs.pages import blocks
from docs.reader import Page, Reader
from docs.test_docs import PROVISIONED, WITH_SUPABASE, environment
from playwright.sync_api import expect, sync_playwright
from story import User, age, beat, count_rows, set_status

from arbiter_db.demo.gateway import Gateway
from arbiter_db.demo.stage import sql_file
from arbiter_db.demo.story import MACHINE, TRADER, USER

from .supabase_cli import find
from .test_export import Host, host
from .test_web import ARGUMENTS, CHROMIUM, TIMEOUT_MS

__all__ = ["host"]

ADA = User(str(USER), str(TRADER))

#: The page, and what its modules have besides the module's own code.
HTML = """<!doctype html><meta charset="utf-8"><title>docs</title><body>
{html}
<script src="/supabase.js"></script>
<script type="module" src="app.js"></script>
"""
MODULE = """
const key = {{ Authorization: `Bearer ${{location.hash.slice(1)}}` }};
const {{ url, anonKey, token }} = await (await fetch('/config.json', {{ headers: key }})).json();
const headers = {{ Authorization: `Bearer ${{token}}` }};
const supabase = window.supabase.createClient(url, anonKey, {{ global: {{ headers }} }});
const signal = {{
  trader_id: '{trader}', symbol: 'ETHUSDT', interval: '5m', signal: 'buy',
  bar_time: '2026-01-05T09:15:00Z',
}};
{js}
window.told = {{ data, error, status }};
"""


def test_every_block_of_the_page_for_supabase_works(host: Host, tmp_path: Path) -> None:
    [page] = WITH_SUPABASE
    found = blocks(page)
    assert [block.language for block in found] == [
        "console",
        "console",
        "console",
        "html",
        "js",
        "js",
    ]
    export, rejected, module, html, *scripts = found

    hosted = host(tmp_path)
    env = environment(hosted.db, tmp_path)
    env |= {
        "DATABASE_URL": hosted.url,
        "PATH": os.pathsep.join([str(find().parent), env["PATH"]]),
        "SUPABASE_INTERNAL_TELEMETRY": "off",
    }
    reader = Reader(Page(folders=("src",)), tmp_path, env, lambda words: ([], {}))
    hosted.run("db", "push")  # the app's own migration
    reader.type([export])

    with hosted.db.connect() as owner:
        owner.execute(sql_file("people.sql"))
        machine = str(MACHINE)
        owner.execute(PROVISIONED)
        set_status(owner, machine, "running")
        beat(owner, machine)
        beat(owner, machine)
        set_status(owner, machine, "stopped")
        with Gateway(hosted.db.conninfo, pages=tmp_path / "src") as gateway:
            token = gateway.token("authenticated", USER)
            gateway.config["token"] = token
            reader.env |= {
                "SUPABASE_URL": gateway.url,
                "ANON_KEY": gateway.anon_key,
                "USER_TOKEN": token,
            }
            reader.type([rejected, module])
            reader.renew()
            assert count_rows(owner, "public.signals") == 0

            age(owner, machine, left_running=timedelta(minutes=1))
            code = MODULE.format(trader=TRADER, js="\n".join(script.text for script in scripts))
            (tmp_path / "src" / "app.js").write_text(code, encoding="utf-8")
            text = HTML.format(html=html.text)
            (tmp_path / "src" / "index.html").write_text(text, encoding="utf-8")
            told = visit(gateway.page_url)
            assert (told["error"], told["data"][0]["source"]) == (None, "local")
            assert told["status"]["can_write_local"] is True
            assert count_rows(owner, "public.signals") == 1


def visit(url: str) -> dict[str, Any]:
    """What the modules of the page have got, once all elements show what they must."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = chromium.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        expect(page.locator("arbiter-badge")).to_have_text("Browser mode", timeout=TIMEOUT_MS)
        expect(page.locator("button[data-arbiter-generates]")).to_be_enabled(timeout=TIMEOUT_MS)
        page.wait_for_function("window.told !== undefined", timeout=TIMEOUT_MS)
        told: dict[str, Any] = page.evaluate("window.told")
        for element in ("arbiter-toasts", "arbiter-confirm"):
            assert page.evaluate(f"customElements.get('{element}') !== undefined")
            assert page.locator(element).count() == 1
        chromium.close()
    assert problems == []
    return told
