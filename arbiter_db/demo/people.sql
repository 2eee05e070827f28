-- Two users of the trading app and a built-in trader. The ids are easy to tell apart when printed.

insert into auth.users (id, email)
values
  ('ada00000-0000-4000-8000-000000000001', 'ada@example.com'),
  ('b0b00000-0000-4000-8000-000000000002', 'bob@example.com');

insert into public.traders (id, user_id, name)
values
  ('ada00000-0000-4000-8000-00000000007a', 'ada00000-0000-4000-8000-000000000001', 'Momentum'),
  ('b0b00000-0000-4000-8000-00000000007a', 'b0b00000-0000-4000-8000-000000000002', 'Breakout');

insert into public.traders (id, name, is_builtin)
values ('b0000000-0000-4000-8000-00000000007a', 'Golden cross', true);
