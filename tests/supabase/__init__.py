"""arbiter as a Supabase project meets it: PostgREST, supabase-js, PgBouncer, the Supabase CLI."""
