"""The mutation tests' own tool: what it changes, what it leaves alone, and how it counts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
from pglast import parse_plpgsql, parse_sql

from mutate.mutants import Mutant, draw, numbered
from mutate.report import Equivalent, Score, equivalents, markdown, matched
from mutate.sql import sql_mutants
from mutate.trials import ROOT, Result, stages

PATH = "sql/50_sample.sql"

#: Something of each kind. The words of the comments must stay as they are.
SAMPLE = """
-- A comment with true, and clock_timestamp() for update.
set local lock_timeout = '5s';
create or replace function arbiter._sample(p_user_id uuid, p_at timestamptz default null)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
declare
  v_at timestamptz := coalesce(p_at, clock_timestamp());
  v_row record;
begin
  /* if 1 = 2 then return false; end if; */
  if p_user_id is null and not v_at < now() - interval '30 s' then -- because 1 = 1
    perform arbiter._fail('no_data_found',
      'there is no such user', 'Name another; nothing was changed.');
  elsif current_setting('transaction_isolation') <> 'read committed' then
    return true;
  end if;
  for v_row in
    select distinct l.user_id, min(l.epoch)
      from arbiter.leases l left join arbiter.notes n on n.id = l.id
     where l.user_id = p_user_id and l.holder = 'local'
       and l.epoch = any ('{insert,update}'::text[])
     order by l.user_id limit 1 for key share skip locked
  loop
    exit when v_row.user_id is distinct from p_user_id;
    perform set_config('arbiter.sample', pg_current_xact_id()::text, true);
    execute format('lock table %s in share row exclusive mode', 'arbiter.leases');
    execute format('create policy %I on t as restrictive using (source = ''local'')', 'arbiter_p');
    execute format('alter table t enable always trigger %I', 'arbiter_t');
    execute format('create trigger t after insert or update on %s execute function f()', 't');
  end loop;
  perform arbiter._lock_lease(p_user_id);
  return found;
end
$$;
comment on function arbiter._sample(uuid, timestamptz) is
  'Whether true is not false; null when 1 = 2 and clock_timestamp() is for update.';
grant select on arbiter.leases to public;
"""

KINDS = {
    "sql": {
        "and or", "any all", "arithmetic", "branch", "clause", "coalesce", "comparison",
        "condition", "condition name", "distinct", "duration", "event", "function", "list",
        "message", "negated if", "not", "null test", "number", "statement", "true false", "word",
    },
    "sql-locks": {
        "clock", "definer", "duration", "enable always", "isolation level", "local setting",
        "lock statement", "order", "policy", "privilege", "row lock", "set row_security",
        "set search_path", "skip locked", "table lock", "transaction id",
    },
}  # fmt: skip


def mutants() -> list[Mutant]:
    return numbered(sql_mutants(PATH, SAMPLE))


@pytest.mark.parametrize("area", KINDS)
def test_there_are_mutants_of_each_kind(area: str) -> None:
    assert {mutant.kind for mutant in mutants() if mutant.area == area} == KINDS[area]


def test_the_parser_accepts_each_mutant_of_the_sample() -> None:
    for mutant in mutants():
        changed = mutant.apply(SAMPLE)
        assert changed != SAMPLE
        parse_sql(changed)
        parse_plpgsql(changed)


def test_comments_are_left_alone() -> None:
    kept = [
        "-- A comment with true, and clock_timestamp() for update.",
        "/* if 1 = 2 then return false; end if; */",
        "-- because 1 = 1",
        "'Whether true is not false; null when 1 = 2 and clock_timestamp() is for update.'",
    ]
    for mutant in mutants():
        changed = mutant.apply(SAMPLE)
        for text in kept:
            # A removed condition or branch may take a comment inside it along.
            assert text in changed or text in mutant.old


def change(kind: str) -> set[tuple[str, str]]:
    """What becomes of what, by the mutants of a kind."""
    return {(mutant.old, mutant.new) for mutant in mutants() if mutant.kind == kind}


def test_what_is_changed() -> None:
    assert change("row lock") == {
        ("for key share", "for no key update"),
        ("for key share skip locked", ""),
    }
    assert change("null test") == {("is", "is not")}
    assert change("coalesce") == {("p_at, clock_timestamp()", "clock_timestamp(), p_at")}
    assert change("condition") == {
        ("p_user_id is null and", ""),
        ("and not v_at < now() - interval '30 s'", ""),
        ("l.user_id = p_user_id and", ""),
        ("and l.holder = 'local'", ""),
        ("and l.epoch = any ('{insert,update}'::text[])", ""),
    }
    assert change("table lock") == {("share row exclusive", "row exclusive")}
    assert change("policy") == {("as restrictive", ""), ("(source = ''local'')", "(true)")}
    assert change("list") == {("'{insert,update}'", "'{insert}'")}
    assert change("set row_security") == {("set row_security = off", "")}


def test_a_draw_depends_on_its_seed_alone() -> None:
    found = mutants()

    def drawn(seed: int, of: Iterable[Mutant]) -> list[Mutant]:
        return list(islice(draw(of, seed), 12))

    assert drawn(7, found) == drawn(7, reversed(found))
    assert drawn(7, found) != drawn(8, found)


def test_a_draw_is_the_same_when_the_code_changes_elsewhere() -> None:
    found = mutants()
    rest = [mutant for mutant in found if mutant.kind != "word"]
    drawn = [mutant for mutant in draw(found, 7) if mutant.kind != "word"]
    assert list(draw(rest, 7)) == drawn != sorted(drawn, key=lambda mutant: mutant.start)


def test_a_draw_takes_each_site_once_and_ends() -> None:
    drawn = list(draw(mutants(), 7))
    places = [(mutant.kind, mutant.start, len(mutant.old)) for mutant in drawn]
    assert len(places) == len(set(places))
    assert {mutant.kind for mutant in drawn} == KINDS["sql"] | KINDS["sql-locks"]


def test_mutants_with_the_same_change_have_different_keys() -> None:
    keys = [mutant.key for mutant in mutants()]
    assert len(keys) == len(set(keys))


def test_a_file_that_has_changed_is_not_mutated() -> None:
    with pytest.raises(ValueError, match="has changed since"):
        mutants()[0].apply("-- another text")


def test_the_counts_and_the_two_scores() -> None:
    trials = [(Result("killed"), False)] * 6
    trials += [(Result("survived"), True), (Result("survived"), False), (Result("invalid"), False)]
    score = Score.of("sql", trials)
    assert (score.drawn, score.valid) == (9, 8)
    assert score.cells() == ["sql", "9", "1", "6", "2", "1", "75 %", "86 %"]
    assert Score.of("js", []).cells()[-2:] == ["-", "-"]


def argued(mutant: Mutant, within: str = "") -> Equivalent:
    old, new = mutant.lines(SAMPLE)
    return Equivalent(PATH, old, new, "because of this and of that", within)


def test_an_entry_belongs_to_the_lines_and_the_function() -> None:
    mutant = next(m for m in mutants() if m.kind == "null test")
    others = [m for m in mutants() if m != mutant]
    assert argued(mutant).matches(mutant, SAMPLE)
    assert argued(mutant, "_sample").matches(mutant, SAMPLE)
    assert not argued(mutant, "_other").matches(mutant, SAMPLE)
    assert not any(argued(mutant).matches(other, SAMPLE) for other in others)


def test_an_entry_that_matches_nothing_is_reported() -> None:
    known = argued(mutants()[0])
    gone = Equivalent(PATH, "old", "new", "because of this and of that")
    texts = {PATH: SAMPLE}
    found = matched([known, gone], mutants(), texts)
    assert found == {mutants()[0]: known}
    page = markdown("A title", [], [(mutants()[0], SAMPLE, known)], [gone])
    assert f"{PATH}:{mutants()[0].line(SAMPLE)} ({mutants()[0].kind})" in page
    assert "Equivalent: because of this and of that" in page
    assert f"- {PATH}: `old`" in page


def test_an_entry_gives_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "equivalent.toml"
    entry = '[[mutation]]\npath = "a.sql"\nold = "a"\nnew = """\n  b\n  c"""\nreason = "{}"\n'
    file.write_text(entry.format("no row has such a number"), encoding="utf-8")
    assert equivalents(file) == [Equivalent("a.sql", "a", "b\nc", "no row has such a number")]
    file.write_text(entry.format("equivalent"), encoding="utf-8")
    with pytest.raises(ValueError, match="say why"):
        equivalents(file)


@pytest.mark.parametrize(
    ("area", "path"),
    [("sql", "sql/14_lease.sql"), ("sql", "sql/50_new.sql"), ("python", "arbiter_db/api.py")],
)
def test_a_mutant_meets_all_tests_before_it_survives(area: str, path: str) -> None:
    runs = stages(Mutant(area, "kind", path, 0, "a", "b"), 2)
    named = {part for run in runs for part in run if part.startswith("tests")}
    ignored = {part.removeprefix("--ignore=") for run in runs for part in run if "=" in part}
    for marker in ("not slow", "slow"):
        assert any(marker in run and "tests" in run for run in runs)
    assert "tests/supabase" in named
    others = {"tests/mutate", "tests/bench", "tests/servers", "tests/proof/test_checker.py"}
    assert ignored - others <= named
    assert all((ROOT / name).exists() for name in named)
