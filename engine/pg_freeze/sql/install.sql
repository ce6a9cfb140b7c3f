-- The journal's routines, and the only code that thaws.
--
-- Runs in the maintenance database at each installation: every routine, view and trigger is made anew. The schema is there
-- already, and so are its tables (journal/migrations/): whoever runs this has made them in the same transaction, or has
-- looked whose they are.
-- Nothing here is SECURITY DEFINER: whoever calls a routine needs the rights for what it does. (A procedure
-- that commits may not be, and could not have SET clauses either. So such a procedure sets the search_path itself, first
-- of all, after every COMMIT and after every CALL of another one: of an operator, a type or a function somebody could have made one of his own in a schema of the
-- caller's search_path, for a superuser to run. What comes before that, its declarations, has qualified types, and no
-- operator.)
--
-- Errors raised here, for classification by SQLSTATE:
--   PF001  the ticket is void: a resume, or a newer attempt of the same holder, came first
--   PF002  a database is held by another freeze (DETAIL is a JSON object that describes it)
--   PF003  no dead-man switch watches this freeze
--   PF004  a named database does not exist
--   PF005  at least one freeze could not be thawed
--   PF006  the freeze to adopt has been thawed
--   PF007  a session that held the locks is gone
--   PF008  the strategy privileges cannot do its work here; the message says why, and what to do

REVOKE ALL ON SCHEMA pgfreeze FROM PUBLIC;

-- The sessions of a database that are not known to be harmless, read afresh at each call.
--
-- backend_type is an open list, to which extensions add their own: so the safe ones are named, all others count. Parallel
-- workers belong to their leader. A walsender is safe only while it streams, since one that was opened with
-- replication=database also runs plain SQL. NULL (hidden from us) is never safe.
DROP VIEW IF EXISTS pgfreeze.sessions;
CREATE VIEW pgfreeze.sessions AS
SELECT a.datid, a.datname, a.pid, a.usename, a.application_name, a.state, a.backend_type, a.backend_start, a.xact_start,
       (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = CURRENT_USER)
       OR (a.usesysid IS NOT NULL
           AND NOT COALESCE((SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.oid = a.usesysid), true)
           AND (pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')
                OR pg_catalog.pg_has_role(a.usesysid, 'USAGE'))) AS signalable,
       -- With track_activities off the state is 'disabled' and xact_start unknown; but whoever is in a
       -- transaction holds the lock on his own virtual transaction id.
       CASE WHEN a.state = 'disabled'
            THEN NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.locktype = 'virtualxid')
            ELSE a.state IN ('idle', 'idle in transaction (aborted)') END AS expendable
  FROM pg_catalog.pg_stat_activity a
 WHERE a.pid <> pg_catalog.pg_backend_pid()
   AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
   AND a.backend_type IS DISTINCT FROM 'parallel worker'
   AND NOT (a.backend_type IS NOT DISTINCT FROM 'walsender'
            AND EXISTS (SELECT FROM pg_catalog.pg_stat_replication s
                         WHERE s.pid = a.pid AND s.state IN ('catchup', 'streaming', 'backup')));


-- The sessions that are starting in a database. They have read its settings, or are about to, but pg_stat_activity does
-- not say yet to which database they belong; until it does they hold this lock, which nobody else takes in this mode.
DROP VIEW IF EXISTS pgfreeze.starting;
CREATE VIEW pgfreeze.starting AS
SELECT l.objid AS datid, d.datname, l.pid
  FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.objid
 WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_database'::pg_catalog.regclass
   AND l.mode = 'RowExclusiveLock' AND l.granted;


-- Every default_transaction_read_only = off that would override the database's own setting for some role.
-- Precedence: role in database > role > database. `prior` is what the role has in this database, if anything.
DROP VIEW IF EXISTS pgfreeze.overrides;
CREATE VIEW pgfreeze.overrides AS
WITH settings AS (
    SELECT s.setdatabase, s.setrole, pg_catalog.split_part(c.entry, '=', 2) AS value
      FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c (entry)
     WHERE pg_catalog.split_part(c.entry, '=', 1) = 'default_transaction_read_only'
)
SELECT d.oid AS database, d.datname, r.oid AS role, r.rolname, inside.value AS prior
  FROM pg_catalog.pg_database d
 CROSS JOIN pg_catalog.pg_roles r
  LEFT JOIN settings inside ON inside.setdatabase = d.oid AND inside.setrole = r.oid
  LEFT JOIN settings everywhere ON everywhere.setdatabase = 0 AND everywhere.setrole = r.oid
 WHERE NOT COALESCE(inside.value, everywhere.value, 'on')::boolean
       -- Settings are those of who logs in, and only where he may: SET ROLE does not load them.
   AND r.rolcanlogin AND pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT');


CREATE OR REPLACE FUNCTION pgfreeze.draw_ticket(
    act text, holder text, databases text[], began timestamptz)
RETURNS pgfreeze.tickets
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    drawn pgfreeze.tickets;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    -- One drawer at a time, or two attempts would each miss the other's ticket.
    LOCK TABLE pgfreeze.tickets IN SHARE ROW EXCLUSIVE MODE;
    -- An attempt that began before its holder resumed, or before an attempt that has drawn already, comes too
    -- late: its ticket is born void.
    INSERT INTO pgfreeze.tickets (act, holder, databases, began_at, voided_at)
    SELECT draw_ticket.act, draw_ticket.holder, draw_ticket.databases, COALESCE(draw_ticket.began, pg_catalog.clock_timestamp()),
           CASE WHEN draw_ticket.act = 'resume'
                  OR EXISTS (SELECT FROM pgfreeze.tickets r
                              WHERE r.holder = draw_ticket.holder AND r.databases && draw_ticket.databases
                                AND CASE r.act WHEN 'resume' THEN r.drawn_at >= draw_ticket.began
                                               ELSE r.began_at > draw_ticket.began END)
                THEN pg_catalog.clock_timestamp() END
    RETURNING * INTO drawn;
    -- One that is void itself voids no others: they are newer than it.
    IF drawn.act = 'pause' AND drawn.voided_at IS NOT NULL THEN RETURN drawn; END IF;
    -- Waits for a freezing transaction that has already locked its ticket.
    UPDATE pgfreeze.tickets t
       SET voided_at = pg_catalog.clock_timestamp()
     WHERE t.holder = draw_ticket.holder AND t.databases && draw_ticket.databases
       AND t.ticket < drawn.ticket AND t.voided_at IS NULL;
    RETURN drawn;
END $$;


-- Whether one of these databases is marked as frozen from inside, that is by the strategy privileges. Any role can set the
-- mark for itself: only those count who could have put a journal there.
CREATE OR REPLACE FUNCTION pgfreeze.inside(names text[])
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) AS c (entry)
                    WHERE d.datname::text = ANY (names) AND d.datname <> current_database() AND s.setrole <> 0
                      AND starts_with(c.entry, 'application_name=pg-freeze inside ')
                      AND has_database_privilege(s.setrole, d.oid, 'CREATE'))
$$;


-- Whether this database is read-only by default, perhaps by a freeze whose journal is in another one.
CREATE OR REPLACE FUNCTION pgfreeze.read_only_here()
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM pg_database d JOIN pg_db_role_setting s ON s.setdatabase = d.oid AND s.setrole = 0,
                           unnest(s.setconfig) AS c (entry)
                    WHERE d.datname = current_database() AND split_part(c.entry, '=', 1) = 'default_transaction_read_only'
                      AND split_part(c.entry, '=', 2)::boolean)
$$;


-- What must be so for a freeze to begin or to be adopted, asked under locks that are held until that is committed.
CREATE OR REPLACE FUNCTION pgfreeze.may_freeze(my_ticket bigint, the_token uuid, needs_dead_man boolean)
RETURNS pgfreeze.tickets
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t    pgfreeze.tickets;
    held pgfreeze.freezes;
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    SELECT * INTO t FROM pgfreeze.tickets WHERE ticket = my_ticket FOR UPDATE;
    IF t.ticket IS NULL OR t.voided_at IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF001', MESSAGE = format('ticket %s of %L is void', my_ticket, t.holder);
    END IF;
    LOCK TABLE pgfreeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM pgfreeze.freezes WHERE token = the_token AND state IN ('thawing', 'thawed')) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF006', MESSAGE = format('%s has been thawed', the_token);
    END IF;
    IF needs_dead_man AND NOT EXISTS (SELECT FROM pgfreeze.dead_men() m WHERE m.token = the_token) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF003', MESSAGE = format('no dead-man switch watches %s', the_token);
    END IF;
    SELECT f.* INTO held FROM pgfreeze.freezes f
      JOIN pgfreeze.frozen_databases b ON b.token = f.token AND b.active
      JOIN pg_database p ON p.oid = b.database
     WHERE p.datname::text = ANY (t.databases) AND f.token <> the_token LIMIT 1;
    IF held.token IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = format('held by %L', held.holder), DETAIL = (to_jsonb(held) - 'older')::text;
    END IF;
    IF pgfreeze.inside(t.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'its privileges are revoked, from inside';
    END IF;
    RETURN t;
END $$;


-- Freeze, or adopt the freeze that this holder already has: everything commits together, or nothing does.
-- One statement of the client, so that a client stopped midway holds no lock.
CREATE OR REPLACE FUNCTION pgfreeze.begin_freeze(
    my_ticket bigint, new_token uuid, lease interval, admit text, needs_dead_man boolean, strategy text, roles text[])
RETURNS pgfreeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t         pgfreeze.tickets;
    held      pgfreeze.freezes;
    requested constant timestamptz := pg_catalog.clock_timestamp();
BEGIN
    t := pgfreeze.may_freeze(my_ticket, new_token, needs_dead_man);
    SELECT * INTO held FROM pgfreeze.freezes WHERE token = new_token;
    IF held.token IS NOT NULL THEN
        IF EXISTS (SELECT FROM pgfreeze.frozen_databases b
                     LEFT JOIN pg_catalog.pg_database p ON p.oid = b.database AND p.datconnlimit <> -2
                    WHERE b.token = new_token AND p.oid IS NULL) THEN
            RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'the freeze to adopt is of a database that was dropped since: resume first';
        END IF;
        UPDATE pgfreeze.freezes f
           SET ticket = my_ticket, lease_until = GREATEST(f.lease_until, pg_catalog.clock_timestamp() + begin_freeze.lease)
         WHERE f.token = held.token
        RETURNING * INTO held;
        RETURN held;
    END IF;

    INSERT INTO pgfreeze.freezes (token, ticket, holder, databases, strategy, roles, admit, state, requested_at,
                                           changed_at, lease_until)
    VALUES (new_token, my_ticket, t.holder, t.databases, begin_freeze.strategy, begin_freeze.roles, begin_freeze.admit, 'draining',
            requested, pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp() + begin_freeze.lease)
    RETURNING * INTO held;
    EXECUTE pg_catalog.format('SELECT pgfreeze.%I($1)', pgfreeze.routine('engage', held)) USING held;
    RETURN held;
END $$;


-- The name of the routine by which a strategy does something, should it have one.
CREATE OR REPLACE FUNCTION pgfreeze.routine(act text, f pgfreeze.freezes)
RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT act || '_' || translate(f.strategy, '-', '_')
$$;


-- How the strategy read-only engages: the databases are closed, read-only by default, and so for each role that would override that.
CREATE OR REPLACE FUNCTION pgfreeze.engage_read_only(f pgfreeze.freezes)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    d       record;
    s       record;
    found_n integer := 0;
BEGIN
    FOR d IN SELECT p.oid, p.datname, p.datallowconn,
                    (SELECT pg_catalog.split_part(c.entry, '=', 2)
                       FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c (entry)
                      WHERE s.setdatabase = p.oid AND s.setrole = 0
                        AND pg_catalog.split_part(c.entry, '=', 1) = 'default_transaction_read_only') AS prior
               FROM pg_catalog.pg_database p WHERE p.datname::text = ANY (f.databases) ORDER BY p.oid
    LOOP
        found_n := found_n + 1;
        INSERT INTO pgfreeze.frozen_databases (token, database, name, closed)
        VALUES (f.token, d.oid, d.datname, d.datallowconn AND f.admit <> 'readers');
        IF d.datallowconn AND f.admit <> 'readers' THEN
            EXECUTE pg_catalog.format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS false', d.datname);
        END IF;
        IF NOT COALESCE(d.prior, 'off')::boolean THEN
            INSERT INTO pgfreeze.prior_settings VALUES (f.token, d.oid, 0, d.prior);
            EXECUTE pg_catalog.format('ALTER DATABASE %I SET default_transaction_read_only = on', d.datname);
        END IF;
        FOR s IN SELECT * FROM pgfreeze.overrides o WHERE o.database = d.oid ORDER BY o.role LOOP
            BEGIN
                INSERT INTO pgfreeze.prior_settings VALUES (f.token, d.oid, s.role, s.prior);
                EXECUTE pg_catalog.format('ALTER ROLE %I IN DATABASE %I SET default_transaction_read_only = on', s.rolname, d.datname);
            EXCEPTION WHEN insufficient_privilege THEN
                -- Any role may override the default for itself, as it may with BEGIN READ WRITE: that must not keep anybody
                -- from freezing. Preflight warns of it, and a proof finds what was written.
                IF f.admit <> 'nobody' AND (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.oid = s.role) THEN
                    RAISE;
                END IF;
            END;
        END LOOP;
    END LOOP;
    IF found_n <> pg_catalog.cardinality(f.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'a database does not exist';
    END IF;
END $$;


-- Whether the sessions that hold the locks of a freeze are all there; with them go the locks.
CREATE OR REPLACE FUNCTION pgfreeze.locked(sessions jsonb)
RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT NOT EXISTS (
        SELECT FROM pg_catalog.jsonb_array_elements(sessions) s
         WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity((s ->> 'pid')::integer) a
                            WHERE a.backend_start = (s ->> 'backend_start')::timestamptz))
$$;


-- Record a freeze that sessions hold already, by their locks: nothing else is changed, and nothing is left to undo but to let them go.
CREATE OR REPLACE FUNCTION pgfreeze.record_held(
    my_ticket bigint, new_token uuid, strategy text, lease interval, pids integer[], waited interval, needs_dead_man boolean)
RETURNS pgfreeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    t    pgfreeze.tickets;
    held pgfreeze.freezes;
    now_ constant timestamptz := pg_catalog.clock_timestamp();
    n    integer;
BEGIN
    t := pgfreeze.may_freeze(my_ticket, new_token, needs_dead_man);
    INSERT INTO pgfreeze.freezes (token, ticket, holder, databases, strategy, admit, state, requested_at, changed_at,
                                           barrier_at, drained_at, frozen_at, lease_until, sessions)
    SELECT new_token, my_ticket, t.holder, t.databases, record_held.strategy, 'readers', 'frozen', now_ - waited, now_ - waited, now_, now_,
           now_, now_ + record_held.lease,
           (SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('pid', a.pid, 'backend_start', a.backend_start)),
                            '[]')
              FROM pg_catalog.pg_stat_activity a WHERE a.pid = ANY (pids))
    RETURNING * INTO held;
    IF pg_catalog.jsonb_array_length(held.sessions) <> pg_catalog.cardinality(pids) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF007', MESSAGE = 'a session that held the locks is gone';
    END IF;
    INSERT INTO pgfreeze.frozen_databases (token, database, name, closed)
    SELECT new_token, p.oid, p.datname, false FROM pg_catalog.pg_database p WHERE p.datname::text = ANY (t.databases);
    GET DIAGNOSTICS n = ROW_COUNT;
    IF n <> pg_catalog.cardinality(t.databases) THEN
        RAISE EXCEPTION USING ERRCODE = 'PF004', MESSAGE = 'a database does not exist';
    END IF;
    RETURN held;
END $$;


-- Mark the barrier, once, just after the freeze was committed: remember every session that was there before. By its start it
-- could not be told later: somebody may have set the clock back meanwhile. No row if the freeze is gone.
CREATE OR REPLACE FUNCTION pgfreeze.mark_barrier(the_token uuid)
RETURNS SETOF pgfreeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    starting integer[];
    seen     jsonb;
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    -- First those that are starting, of which no more is known yet: whoever is done with it by now is seen by what follows.
    starting := ARRAY(SELECT s.pid FROM pgfreeze.starting s JOIN pgfreeze.frozen_databases d ON d.database = s.datid
                       WHERE d.token = the_token);
    PERFORM pg_stat_clear_snapshot();
    WITH there AS MATERIALIZED (
        SELECT a.pid, a.backend_start, a.xact_start
          FROM pg_stat_get_activity(NULL) a JOIN pgfreeze.frozen_databases d ON d.database = a.datid AND d.token = the_token
    )
    SELECT COALESCE(jsonb_agg(to_jsonb(o)), '[]') INTO seen
      FROM (SELECT * FROM there
             UNION ALL
            SELECT s.pid, NULL, NULL FROM unnest(starting) AS s (pid) WHERE s.pid NOT IN (SELECT t.pid FROM there t)) AS o;
    RETURN QUERY
    UPDATE pgfreeze.freezes f
       SET barrier_at = COALESCE(f.barrier_at, clock_timestamp()), older = CASE WHEN f.barrier_at IS NULL THEN seen ELSE f.older END
     WHERE f.token = the_token AND f.state IN ('draining', 'frozen')
    RETURNING f.*;
END $$;


-- The sessions that were there at the barrier. One that was starting has no backend_start here; one that was idle, no xact_start.
CREATE OR REPLACE FUNCTION pgfreeze.older(the_token uuid)
RETURNS TABLE (pid integer, backend_start timestamptz, xact_start timestamptz)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT o.pid, o.backend_start, o.xact_start
      FROM pgfreeze.freezes f, jsonb_to_recordset(f.older) AS o (pid integer, backend_start timestamptz, xact_start timestamptz)
     WHERE f.token = the_token
$$;


-- Drained: let the readers in if so asked, and record that. No row if the freeze is gone, or no longer this ticket's.
CREATE OR REPLACE FUNCTION pgfreeze.record_frozen(
    my_ticket bigint, terminated jsonb, lingering jsonb, warnings jsonb)
RETURNS SETOF pgfreeze.freezes
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    f pgfreeze.freezes;
    d record;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    PERFORM FROM pgfreeze.tickets WHERE ticket = my_ticket AND voided_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN RETURN; END IF;
    LOCK TABLE pgfreeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    SELECT * INTO f FROM pgfreeze.freezes
     WHERE ticket = my_ticket AND state IN ('draining', 'frozen') AND lease_until > pg_catalog.clock_timestamp();
    IF NOT FOUND THEN RETURN; END IF;
    -- Both kinds may have begun at once, neither seeing the other's; now at least one of the two does.
    IF pgfreeze.inside(f.databases) THEN   -- but for this database itself
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'its privileges are revoked, from inside';
    ELSIF f.databases = ARRAY[current_database()::text] AND pgfreeze.read_only_here() THEN
        RAISE EXCEPTION USING ERRCODE = 'PF002', MESSAGE = 'it was made read-only meanwhile, perhaps by a freeze';
    END IF;
    UPDATE pgfreeze.freezes u
       SET state = 'frozen',
           drained_at = COALESCE(u.drained_at, pg_catalog.clock_timestamp()),
           frozen_at = COALESCE(u.frozen_at, pg_catalog.clock_timestamp()),
           terminated = record_frozen.terminated, lingering = record_frozen.lingering, warnings = record_frozen.warnings
     WHERE u.token = f.token
    RETURNING * INTO f;
    IF f.admit = 'readers-once-drained' THEN
        FOR d IN SELECT p.datname FROM pgfreeze.frozen_databases b
                   JOIN pg_catalog.pg_database p ON p.oid = b.database
                  WHERE b.token = f.token AND b.closed AND NOT p.datallowconn
        LOOP
            EXECUTE pg_catalog.format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS true', d.datname);
        END LOOP;
    END IF;
    RETURN NEXT f;
END $$;


-- What of a freeze is still to be restored, and the statement that does. Joined by OID: what was dropped since needs no
-- thaw, what was renamed gets it under its new name. A DROP DATABASE that was interrupted leaves a datconnlimit of -2:
-- nothing can be done with that database any more, but to drop it.
CREATE OR REPLACE FUNCTION pgfreeze.unrestored(the_token uuid)
RETURNS TABLE (database oid, role oid, opens boolean, what text, statement text)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.database, p.role, false, t.target || ': default_transaction_read_only',
           CASE WHEN p.value IS NULL THEN format('ALTER %s RESET default_transaction_read_only', t.target)
                ELSE format('ALTER %s SET default_transaction_read_only = %L', t.target, p.value) END
      FROM pgfreeze.prior_settings p
      JOIN pg_database d ON d.oid = p.database AND d.datconnlimit <> -2
      LEFT JOIN pg_roles r ON r.oid = p.role
     CROSS JOIN LATERAL (SELECT CASE WHEN p.role = 0 THEN format('DATABASE %I', d.datname)
                                     ELSE format('ROLE %I IN DATABASE %I', r.rolname, d.datname) END AS target) t
     WHERE p.token = the_token AND p.restored_at IS NULL AND (p.role = 0 OR r.oid IS NOT NULL)
     UNION ALL
    SELECT b.database, 0, true, format('DATABASE %I: ALLOW_CONNECTIONS', d.datname),
           format('ALTER DATABASE %I WITH ALLOW_CONNECTIONS true', d.datname)
      FROM pgfreeze.frozen_databases b
      JOIN pg_database d ON d.oid = b.database AND d.datconnlimit <> -2
     WHERE b.token = the_token AND b.active AND b.closed AND NOT d.datallowconn
     ORDER BY 1, 2, 3
$$;


-- What a strategy gives back itself, beside settings and sessions. Returns why not all of it is back, as an SQLSTATE; NULL if it is.
CREATE OR REPLACE FUNCTION pgfreeze.release(the_token uuid)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name    text := (SELECT format('pgfreeze.%I', pgfreeze.routine('release', f)) FROM pgfreeze.freezes f WHERE f.token = the_token);
    refused text;
BEGIN
    IF to_regprocedure(name || '(uuid)') IS NOT NULL THEN
        EXECUTE format('SELECT %s($1)', name) INTO refused USING the_token;
    END IF;
    RETURN refused;
END $$;


-- First half of a thaw, in the caller's transaction: exactly the prior settings come back. Safe to repeat. What cannot be
-- restored, or is waited for longer than lock_timeout, keeps nothing else back: it is returned, and left for the next call.
CREATE OR REPLACE FUNCTION pgfreeze.restore_settings(
    the_token uuid, reason text, reader_grace interval DEFAULT interval '0', only_expired boolean DEFAULT false)
RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    s       record;
    refused text;
    failed  jsonb := '[]';
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    LOCK TABLE pgfreeze.freezes IN SHARE ROW EXCLUSIVE MODE;
    -- What this transaction has read of pg_stat_activity is older than this lock: a process id may be another session's now.
    PERFORM pg_stat_clear_snapshot();
    UPDATE pgfreeze.freezes
       SET state = 'thawing', restoring_at = pg_catalog.clock_timestamp(), thawed_by = reason,
           lease_until = CASE WHEN reader_grace > interval '0'
                              THEN GREATEST(lease_until, pg_catalog.clock_timestamp() + reader_grace + interval '5 s')
                              ELSE lease_until END
     WHERE token = the_token AND state IN ('draining', 'frozen')
       -- Asked under the lock: the lease may have been extended since the caller looked.
       AND (NOT only_expired OR lease_until <= pg_catalog.clock_timestamp() OR NOT pgfreeze.locked(sessions));
    IF NOT FOUND THEN
        UPDATE pgfreeze.freezes SET restoring_at = pg_catalog.clock_timestamp()
         WHERE token = the_token AND state = 'thawing'   -- what an earlier thaw could not give back
           AND EXISTS (SELECT FROM pgfreeze.frozen_databases b WHERE b.token = the_token AND b.active);
        IF NOT FOUND THEN RETURN failed; END IF;
    END IF;
    -- What sessions hold goes with them.
    FOR s IN SELECT a.pid
               FROM pgfreeze.freezes f, pg_catalog.jsonb_array_elements(f.sessions) l,
                    pg_catalog.pg_stat_get_activity((l ->> 'pid')::integer) a
              WHERE f.token = the_token AND a.backend_start = (l ->> 'backend_start')::timestamptz
    LOOP
        PERFORM pg_catalog.pg_terminate_backend(s.pid);
    END LOOP;
    FOR s IN SELECT * FROM pgfreeze.unrestored(the_token) LOOP
        BEGIN
            EXECUTE s.statement;
            IF NOT s.opens THEN
                UPDATE pgfreeze.prior_settings SET restored_at = pg_catalog.clock_timestamp()
                 WHERE token = the_token AND database = s.database AND role = s.role;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            failed := failed || pg_catalog.jsonb_build_object('what', s.what, 'why', SQLERRM, 'sqlstate', SQLSTATE);
        END;
    END LOOP;
    BEGIN
        refused := pgfreeze.release(the_token);
    EXCEPTION WHEN OTHERS THEN   -- whatever a strategy gives back itself keeps nothing else back
        RAISE WARNING 'the thaw of %: %', the_token, SQLERRM;
        refused := SQLSTATE;
    END;
    IF refused IS NOT NULL THEN
        failed := failed || pg_catalog.jsonb_build_object('what', 'privileges', 'sqlstate', refused, 'why',
            format('not all could be given back (%s): ', (SELECT string_agg(format('%s %s', e.what, e.name), ', ')
                       FROM (SELECT e.* FROM pgfreeze.revoked_entries(the_token) e WHERE NOT e.present LIMIT 5) AS e))
            || CASE WHEN refused = '42501' THEN 'this role may not grant them' WHEN refused = '55P03' THEN 'somebody is in the way'
                    ELSE 'the server''s log says why' END);
    ELSE
        UPDATE pgfreeze.frozen_databases b
           SET active = EXISTS (SELECT FROM pgfreeze.unrestored(the_token) u WHERE u.database = b.database),
               closed = b.closed AND EXISTS (SELECT FROM pgfreeze.unrestored(the_token) u WHERE u.database = b.database AND u.opens)
         WHERE b.token = the_token AND b.active;
    END IF;
    UPDATE pgfreeze.freezes SET left_over = failed WHERE token = the_token AND left_over <> failed;
    RETURN failed;
END $$;


-- Second half, after that was committed: end the sessions that are read-only still. Each step is a transaction of its own. The
-- first one is given NULL, each other what the one before it has returned, until that holds 'done'. Safe to repeat.
CREATE OR REPLACE FUNCTION pgfreeze.end_readers_step(the_token uuid, reader_grace interval, so_far jsonb)
RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    done     constant jsonb := '{"done": true}';
    f        pgfreeze.freezes;
    b        record;
    waiting  integer;
    ended    integer[];
    starting integer[];
    deadline timestamptz;
    everything boolean;
    noted    timestamptz;
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    IF so_far IS NULL THEN
        -- Whoever connects after the commit can write. When an earlier call died before it could note the time, a
        -- little later than it began has to do: at worst a few sessions that could write reconnect.
        UPDATE pgfreeze.frozen_databases d
           SET restored_at = LEAST(clock_timestamp(), u.restoring_at + interval '10 s')
          FROM pgfreeze.freezes u
         WHERE u.token = the_token AND u.state = 'thawing' AND d.token = the_token AND d.restored_at IS NULL
           -- Not while privileges are still to be given back, nor what a thaw could not restore.
           AND NOT (u.strategy = 'privileges' AND d.active)
           AND NOT EXISTS (SELECT FROM pgfreeze.unrestored(the_token) r WHERE r.database = d.database AND r.role = 0);
        SELECT * INTO f FROM pgfreeze.freezes WHERE token = the_token AND state = 'thawing';
        everything := NOT EXISTS (SELECT FROM pgfreeze.frozen_databases d WHERE d.token = the_token AND d.active);
        noted := (SELECT max(d.restored_at) FROM pgfreeze.frozen_databases d WHERE d.token = the_token);
        IF everything THEN
            UPDATE pgfreeze.freezes SET restored_at = COALESCE(restored_at, noted) WHERE token = the_token AND state = 'thawing';
        END IF;
        IF f.token IS NULL OR noted IS NULL THEN RETURN done; END IF;
        IF f.strategy <> 'read-only' THEN   -- no session was made read-only
            UPDATE pgfreeze.freezes SET state = 'thawed', thawed_at = clock_timestamp() WHERE token = the_token AND state = 'thawing';
            RETURN done;
        END IF;
        RETURN jsonb_build_object('deadline', noted + reader_grace, 'everything', everything, 'ended', '[]'::jsonb);
    END IF;
    SELECT * INTO f FROM pgfreeze.freezes WHERE token = the_token AND state = 'thawing';
    IF f.token IS NULL THEN RETURN done; END IF;
    deadline := so_far ->> 'deadline';
    everything := so_far ->> 'everything';
    ended := ARRAY(SELECT e::integer FROM jsonb_array_elements_text(so_far -> 'ended') e);
    -- Whoever was starting when the settings had just come back may have read them before.
    starting := ARRAY(SELECT s.pid FROM pgfreeze.starting s
                        JOIN pgfreeze.frozen_databases d ON d.database = s.datid AND d.token = the_token AND d.restored_at IS NOT NULL
                       WHERE NOT so_far ? 'starting'
                          OR so_far -> 'starting' @> to_jsonb(s.pid) AND clock_timestamp() < deadline + interval '10 s');
    waiting := cardinality(starting);
    PERFORM pg_stat_clear_snapshot();
    -- Read-only are: all that are left, once drained, but for those that the pause could not end; before that,
    -- what began after the settings were changed (with admit = readers a little earlier, since a session reads its
    -- settings only after it has authenticated).
    FOR b IN SELECT a.pid, a.expendable, a.signalable
               FROM pgfreeze.sessions a
               JOIN pgfreeze.frozen_databases d ON d.database = a.datid AND d.token = the_token
              WHERE a.backend_start <= GREATEST(d.restored_at, (
                        -- its role's own setting came back later than the database's
                        SELECT p.restored_at FROM pgfreeze.prior_settings p JOIN pg_roles r ON r.oid = p.role
                         WHERE p.token = the_token AND p.database = d.database AND r.rolname = a.usename AND everything))
                AND d.restored_at IS NOT NULL
                AND COALESCE(a.backend_type, '') NOT LIKE 'logical replication%'
                AND CASE WHEN f.drained_at IS NOT NULL
                         THEN NOT EXISTS (SELECT FROM jsonb_array_elements(f.lingering) l
                                           WHERE (l ->> 'pid')::integer = a.pid
                                             AND (l ->> 'backend_start')::timestamptz = a.backend_start)
                         ELSE a.backend_start >= f.changed_at
                              - CASE WHEN f.admit = 'readers' THEN interval '1 s' ELSE interval '0' END END
    LOOP
        IF b.pid = ANY (ended) THEN
            CONTINUE;   -- on its way out
        ELSIF NOT b.signalable THEN
            CONTINUE;   -- a superuser's: he can see for himself that he is read-only, and we may not end him
        ELSIF b.expendable OR clock_timestamp() >= deadline THEN
            PERFORM pg_terminate_backend(b.pid);
            ended := array_append(ended, b.pid);
        ELSE
            waiting := waiting + 1;
        END IF;
    END LOOP;
    IF waiting > 0 THEN
        RETURN so_far || jsonb_build_object('starting', to_jsonb(starting), 'ended', to_jsonb(ended));
    END IF;
    UPDATE pgfreeze.freezes
       SET state = CASE WHEN everything THEN 'thawed' ELSE state END,
           thawed_at = CASE WHEN everything THEN clock_timestamp() END,
           readers_ended = readers_ended + cardinality(ended)
     WHERE token = the_token AND state = 'thawing' AND (everything OR cardinality(ended) > 0);
    RETURN done;
END $$;


CREATE OR REPLACE PROCEDURE pgfreeze.end_readers(the_token uuid, reader_grace interval DEFAULT interval '0')
LANGUAGE plpgsql AS $$
DECLARE
    so_far pg_catalog.jsonb;
    rounds pg_catalog.int4;
BEGIN
    rounds := 0;
    LOOP
        so_far := pgfreeze.end_readers_step(the_token, reader_grace, so_far);
        COMMIT;
        EXIT WHEN pg_catalog.jsonb_extract_path(so_far, 'done') IS NOT NULL;
        rounds := pg_catalog.int4pl(rounds, 1);
        IF pg_catalog.int4gt(rounds, 1) THEN
            PERFORM pg_catalog.pg_sleep(0.05);
        END IF;
    END LOOP;
END $$;


-- Thaw one freeze, as far as that is possible, and add what is left. At first nobody is waited for, so that what one session
-- keeps us from is all that comes late; then, if we are patient, long enough for a watch to see who is in the way, and to end it.
CREATE OR REPLACE PROCEDURE pgfreeze.thaw_one(
    the_token uuid, reason text, reader_grace interval, only_expired boolean, patient boolean, INOUT failed jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    patience pg_catalog.text;
    left_    pg_catalog.jsonb;
BEGIN
    FOREACH patience IN ARRAY ARRAY['200ms', '4s', '4s', '4s'] LOOP
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        PERFORM pg_catalog.set_config('lock_timeout', patience, true);
        BEGIN
            left_ := pgfreeze.restore_settings(the_token, reason, reader_grace, only_expired);
        EXCEPTION WHEN OTHERS THEN
            left_ := pg_catalog.jsonb_build_array(
                pg_catalog.jsonb_build_object('what', the_token, 'why', SQLERRM, 'sqlstate', SQLSTATE));
        END;
        COMMIT;   -- killed from here on, it leaves a writable database, and the next call finishes the rest
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        -- Somebody else had a lock, or changed the same row: perhaps not for long.
        EXIT WHEN NOT patient OR NOT EXISTS (
            SELECT FROM pg_catalog.jsonb_array_elements(left_) l
             WHERE pg_catalog.jsonb_extract_path_text(l, 'sqlstate') IN ('55P03', '40P01', 'XX000'));
        IF reader_grace = interval '0' THEN
            CALL pgfreeze.end_readers(the_token);
        END IF;
    END LOOP;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    failed := failed || left_;
    CALL pgfreeze.end_readers(the_token, reader_grace);
END $$;


-- Raise PF005 if anything is left; the DETAIL is it as JSON.
CREATE OR REPLACE FUNCTION pgfreeze.check_thawed(failed jsonb)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF failed <> '[]' THEN
        RAISE EXCEPTION USING ERRCODE = 'PF005', DETAIL = failed::text, MESSAGE = (
            SELECT 'still frozen: ' || string_agg(format('%s (%s)', l ->> 'what', l ->> 'why'), '; ')
              FROM jsonb_array_elements(failed) l);
    END IF;
END $$;


-- Tell whoever thaws here of the databases, or the one, that only a session of theirs can thaw.
CREATE OR REPLACE FUNCTION pgfreeze.tell_where_else(only_ text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT d.datname FROM pg_database d
                 WHERE (only_ IS NULL OR d.datname::text = only_) AND pgfreeze.inside(ARRAY[d.datname::text])
    LOOP
        RAISE WARNING 'database "%" may be frozen from inside: as the role that froze it, connect to it, and there CALL pgfreeze.thaw(%)', name,
            quote_literal(name);
    END LOOP;
END $$;


-- Thaw the freeze that holds this database, whoever holds it: with all its databases, since a freeze of several is one.
--   CALL pgfreeze.thaw('gitlabhq');
CREATE OR REPLACE PROCEDURE pgfreeze.thaw(
    database text, reader_grace interval DEFAULT interval '0', reason text DEFAULT NULL, only_token uuid DEFAULT NULL,
    patient boolean DEFAULT true)
LANGUAGE plpgsql AS $$
DECLARE
    tokens pg_catalog.uuid[];
    one    pg_catalog.uuid;
    was    pg_catalog.text;
    is_    pg_catalog.text;
    why    pg_catalog.text;
    failed pg_catalog.jsonb;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    tokens := ARRAY(
        SELECT DISTINCT f.token
          FROM pgfreeze.freezes f
          JOIN pgfreeze.frozen_databases b ON b.token = f.token
          LEFT JOIN pg_catalog.pg_database d ON d.oid = b.database
         WHERE f.state <> 'thawed'
           AND CASE WHEN thaw.only_token IS NOT NULL THEN f.token = thaw.only_token
                    ELSE thaw.database = d.datname::pg_catalog.text
                         -- By its former name only if no other database of that name is frozen now.
                         OR thaw.database = b.name
                            AND NOT EXISTS (SELECT FROM pg_catalog.pg_database o
                                             WHERE o.datname::pg_catalog.text = b.name AND o.oid <> b.database
                                               AND (d.oid IS NULL OR EXISTS (SELECT FROM pgfreeze.frozen_databases n
                                                                              WHERE n.database = o.oid AND n.active))) END);
    FOR was, is_ IN SELECT b.name, d.datname::pg_catalog.text
                      FROM pgfreeze.frozen_databases b JOIN pg_catalog.pg_database d ON d.oid = b.database
                     WHERE b.active AND b.name = thaw.database AND d.datname::pg_catalog.text <> b.name
    LOOP
        RAISE WARNING 'what was frozen as "%" is called "%" now: to thaw it, CALL pgfreeze.thaw(%)', was, is_,
            pg_catalog.quote_literal(is_);
    END LOOP;
    IF pg_catalog.cardinality(tokens) = 0 THEN
        RAISE NOTICE 'database "%" is not frozen, as far as the journal in "%" tells', thaw.database, pg_catalog.current_database();
    END IF;
    PERFORM pgfreeze.tell_where_else(thaw.database);
    failed := '[]';
    why := COALESCE(thaw.reason, pg_catalog.concat('thaw by ', CURRENT_USER));
    FOREACH one IN ARRAY tokens LOOP
        CALL pgfreeze.thaw_one(one, why, thaw.reader_grace, false, thaw.patient, failed);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    END LOOP;
    PERFORM pgfreeze.check_thawed(failed);
END $$;


-- Thaw each of these freezes; one that fails does not keep back the others, and is reported at the end.
CREATE OR REPLACE PROCEDURE pgfreeze.thaw_each(tokens uuid[], reason text, only_expired boolean)
LANGUAGE plpgsql AS $$
DECLARE
    one    pg_catalog.uuid;
    failed pg_catalog.jsonb;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    failed := '[]';
    FOREACH one IN ARRAY tokens LOOP
        CALL pgfreeze.thaw_one(one, thaw_each.reason, interval '0', thaw_each.only_expired, true, failed);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    END LOOP;
    PERFORM pgfreeze.check_thawed(failed);
END $$;


-- Thaw whatever is frozen: for a server that was restored from a snapshot, and so wakes up frozen.
CREATE OR REPLACE PROCEDURE pgfreeze.thaw_all()
LANGUAGE plpgsql AS $$
DECLARE
    -- A variable: an argument of CALL may not hold a subquery.
    tokens pg_catalog.uuid[];
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    tokens := ARRAY(SELECT token FROM pgfreeze.freezes WHERE state <> 'thawed' ORDER BY requested_at);
    CALL pgfreeze.thaw_each(tokens, pg_catalog.concat('thaw_all by ', CURRENT_USER), false);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM pgfreeze.tell_where_else();
END $$;


-- Thaw what has outlived its lease.
CREATE OR REPLACE PROCEDURE pgfreeze.thaw_expired()
LANGUAGE plpgsql AS $$
DECLARE
    tokens pg_catalog.uuid[];
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    tokens := ARRAY(SELECT token FROM pgfreeze.freezes
                            WHERE state <> 'thawed' AND (lease_until <= pg_catalog.clock_timestamp() OR NOT pgfreeze.locked(sessions))
                            ORDER BY requested_at);
    CALL pgfreeze.thaw_each(tokens, 'lease ended', true);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM pgfreeze.tell_where_else();
END $$;


-- The dead-man switches at work, whichever role started them. Anybody can set the same application_name, and have a
-- statement that begins like this hang while it is parsed; so only those count who may write the journal.
CREATE OR REPLACE FUNCTION pgfreeze.dead_men()
RETURNS TABLE (token uuid, pid integer, since timestamptz)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN a.application_name ~ '^pg-freeze dead-man [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                THEN pg_catalog.substr(a.application_name, 20)::uuid END, a.pid, a.backend_start
      FROM pg_catalog.pg_stat_activity a
     WHERE a.datname = pg_catalog.current_database() AND a.state = 'active'
       AND a.application_name LIKE 'pg-freeze dead-man %' AND a.query LIKE 'CALL pgfreeze.dead_man(%'
       AND pg_catalog.has_function_privilege(a.usesysid, 'pgfreeze.dead_man(uuid, bigint, interval)', 'EXECUTE')
$$;


-- The sessions here that look like thaws at work, and whether somebody has asked for one: the others are of a dead-man switch.
-- Anybody can have a statement that begins like this; so only those count who may run its routines: pg_write_all_data is not enough. Each of those can pose
-- as a thaw all the same, or start one that does nothing but wait: what follows from a thaw is bounded where this is used.
--
-- No view is read here that joins the server's catalogs: somebody may have locked them.
CREATE OR REPLACE FUNCTION pgfreeze.thaws()
RETURNS TABLE (pid integer, asked boolean)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.pid, a.query LIKE 'CALL pgfreeze.thaw%' FROM pg_stat_get_activity(NULL) a
     WHERE a.datid = (SELECT us.datid FROM pg_stat_get_activity(pg_backend_pid()) us)
       AND a.state = 'active' AND a.query LIKE 'CALL pgfreeze.%'
       AND has_function_privilege(a.usesysid, 'pgfreeze.dead_man(uuid, bigint, interval)', 'EXECUTE')
$$;


-- Who is in the way of a session that waits: what pg_blocking_pids() names, but for two kinds.
--
-- A thaw at work is not in the way, since it does what is wanted. Whoever is in its way is in ours, if its own role could end
-- that session too: else a role could pose as a thaw, and have us end whom it may not end. And once ours has starved, thaws of
-- other roles are in the way like everybody else.
--
-- Who waits for the same lock, ahead of us, is not in the way as long as somebody holds it.
DROP FUNCTION IF EXISTS pgfreeze.in_the_way(integer);
CREATE OR REPLACE FUNCTION pgfreeze.in_the_way(the_pid integer, starved boolean)
RETURNS TABLE (pid integer, backend_start timestamptz)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE sessions AS MATERIALIZED (
        SELECT a.pid, a.backend_start, a.usesysid, r.rolsuper
          FROM pg_stat_get_activity(NULL) a LEFT JOIN pg_roles r ON r.oid = a.usesysid
    ), thaws AS MATERIALIZED (
        SELECT s.pid, s.usesysid, s.rolsuper, s.usesysid = (SELECT o.usesysid FROM sessions o WHERE o.pid = the_pid) AS ours
          FROM pgfreeze.thaws() t JOIN sessions s ON s.pid = t.pid
    ), excused AS MATERIALIZED (
        SELECT * FROM thaws t WHERE t.ours OR NOT starved
    ), way (pid) AS (
        SELECT unnest(pg_blocking_pids(the_pid))
         UNION
        SELECT q.pid
          FROM way w
          JOIN excused t ON t.pid = w.pid
         CROSS JOIN LATERAL unnest(pg_blocking_pids(w.pid)) AS q (pid)
          LEFT JOIN sessions s ON s.pid = q.pid
         WHERE t.ours OR t.rolsuper OR q.pid = 0
            OR NOT s.rolsuper AND (pg_has_role(t.usesysid, 'pg_signal_backend', 'USAGE') OR pg_has_role(t.usesysid, s.usesysid, 'USAGE'))
    ), locks AS MATERIALIZED (
        SELECT l.pid, l.granted, (l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid,
                                  l.objid, l.objsubid)::text AS tag
          FROM pg_locks l
    ), named AS MATERIALIZED (
        SELECT w.pid, EXISTS (SELECT FROM locks his JOIN locks ours ON ours.tag = his.tag
                               WHERE his.pid = w.pid AND NOT his.granted AND NOT ours.granted
                                 AND (ours.pid = the_pid OR ours.pid IN (SELECT t.pid FROM excused t))
                                 AND NOT EXISTS (SELECT FROM locks h WHERE h.pid = w.pid AND h.granted AND h.tag = his.tag)) AS queues
          FROM way w
         WHERE w.pid <> the_pid AND w.pid <> pg_backend_pid() AND w.pid NOT IN (SELECT t.pid FROM excused t)
    )
    SELECT n.pid, s.backend_start
      FROM named n LEFT JOIN sessions s ON s.pid = n.pid
     WHERE NOT n.queues OR NOT EXISTS (SELECT FROM named o WHERE NOT o.queues)
$$;


-- The prepared transactions that hold what a session, or a thaw at work, waits for. They have no session: only their role or a
-- superuser can end one, in its database.
DROP FUNCTION IF EXISTS pgfreeze.prepared_in_the_way(integer);
CREATE OR REPLACE FUNCTION pgfreeze.prepared_blocking(the_pid integer)
RETURNS TABLE (gid text, prepared timestamptz, database name, role name)
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.gid, p.prepared, p.database, p.owner
      FROM pg_prepared_xacts p
     WHERE EXISTS (SELECT FROM pg_locks w JOIN pg_locks h ON h.locktype = w.locktype
                     JOIN pg_locks x ON x.virtualtransaction = h.virtualtransaction
                    WHERE (w.pid = the_pid OR w.pid IN (SELECT t.pid FROM pgfreeze.thaws() t))
                      AND NOT w.granted AND h.granted AND h.pid IS NULL
                      AND x.pid IS NULL AND x.transactionid = p.transaction
                      AND (w.database, w.relation, w.page, w.tuple, w.transactionid, w.classid, w.objid, w.objsubid)
                          IS NOT DISTINCT FROM
                          (h.database, h.relation, h.page, h.tuple, h.transactionid, h.classid, h.objid, h.objsubid))
$$;


-- End whoever is in the way of a session, and nobody else, once it has been kept waiting for two seconds in all: by one of them,
-- or by several who take turns. Thaws of other roles are spared until it has starved, that is waited for 20 seconds in all
-- without having got the journal once. Takes what it has returned before, for how long it has waited.
CREATE OR REPLACE FUNCTION pgfreeze.clear_way(the_token uuid, the_pid integer, seen jsonb)
RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    passed  float8;
    waited  float8;
    starved float8;
    b       record;
    okay    boolean;
    blind   boolean := false;
    way     jsonb := '[]';
    found_  jsonb := '[]';
BEGIN
    passed := LEAST(GREATEST(EXTRACT(epoch FROM clock_timestamp() - (seen ->> 'at')::timestamptz), 0), 1);
    seen := seen || jsonb_build_object('at', clock_timestamp());
    IF cardinality(pg_blocking_pids(the_pid)) = 0 THEN RETURN seen; END IF;
    waited := COALESCE((seen ->> 'waited')::float8, 0) + COALESCE(passed, 0);
    starved := CASE WHEN EXISTS (SELECT FROM pg_locks l WHERE l.pid = the_pid AND l.granted AND l.locktype = 'relation'
                                    AND l.relation = 'pgfreeze.freezes'::regclass AND l.mode = 'ShareRowExclusiveLock') THEN 0
                    ELSE COALESCE((seen ->> 'starved')::float8, 0) + COALESCE(passed, 0) END;
    seen := seen || jsonb_build_object('waited', waited, 'starved', starved);
    IF waited < 2 THEN RETURN seen; END IF;
    PERFORM set_config('synchronous_commit', 'local', true);
    PERFORM set_config('lock_timeout', '300ms', true);
    -- What this transaction has read of pg_stat_activity may be older than these locks.
    PERFORM pg_stat_clear_snapshot();
    -- Whoever is to be ended is ended before anything is recorded: somebody may have locked the journal.
    BEGIN
        way := COALESCE((SELECT jsonb_agg(to_jsonb(w)) FROM pgfreeze.in_the_way(the_pid, starved > 20) w), '[]');
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        -- Somebody has locked the server's own catalogs. Then all is taken that bars the way at first hand, but for thaws.
        blind := true;
        way := COALESCE((SELECT jsonb_agg(jsonb_build_object('pid', p.pid, 'backend_start',
                                          (SELECT a.backend_start FROM pg_stat_get_activity(p.pid) a)))
                           FROM unnest(pg_blocking_pids(the_pid)) AS p (pid)
                          WHERE p.pid <> pg_backend_pid() AND p.pid NOT IN (SELECT t.pid FROM pgfreeze.thaws() t)), '[]');
    END;
    FOR b IN SELECT r.pid, r.backend_start FROM jsonb_to_recordset(way) AS r (pid integer, backend_start timestamptz) LOOP
        okay := false;
        BEGIN
            -- His process id may be another's by now, or he may have let go at last.
            PERFORM pg_stat_clear_snapshot();
            okay := b.pid <> 0 AND COALESCE((SELECT pg_terminate_backend(a.pid) FROM pg_stat_get_activity(b.pid) a
                                              WHERE a.backend_start IS NOT DISTINCT FROM b.backend_start
                                                AND cardinality(pg_blocking_pids(the_pid)) > 0), false);
            CONTINUE WHEN NOT okay AND b.pid <> 0;   -- gone
        EXCEPTION WHEN insufficient_privilege OR lock_not_available THEN
            NULL;
        END;
        found_ := found_ || jsonb_build_object('pid', b.pid, 'backend_start', b.backend_start, 'ended', okay);
    END LOOP;
    IF found_ = '[]' THEN RETURN seen; END IF;
    BEGIN
        IF blind THEN RAISE lock_not_available; END IF;
        PERFORM set_config('lock_timeout', '100ms', true);
        INSERT INTO pgfreeze.blockers AS k (token, pid, backend_start, database, role, application, state, ended)
        SELECT DISTINCT ON (x.pid, x.backend_start) the_token, x.pid, x.backend_start, x.database, x.role, x.application, x.state, x.ended
          FROM (SELECT r.pid, COALESCE(r.backend_start, '-infinity') AS backend_start, a.datname AS database, a.usename AS role,
                       a.application_name AS application, a.state, r.ended
                  FROM jsonb_to_recordset(found_) AS r (pid integer, backend_start timestamptz, ended boolean)
                  LEFT JOIN pg_stat_activity a ON a.pid = r.pid AND a.backend_start = r.backend_start
                 WHERE r.pid <> 0
                 UNION ALL
                SELECT 0, p.prepared, p.database, p.role, p.gid, 'prepared', false
                  FROM pgfreeze.prepared_blocking(the_pid) p
                 WHERE found_ @> '[{"pid": 0}]') AS x
        ON CONFLICT ON CONSTRAINT blockers_pkey DO UPDATE SET ended = true WHERE excluded.ended AND NOT k.ended;
    EXCEPTION WHEN OTHERS THEN   -- the journal is locked, or the disk full: then only the server's log says it
        RAISE LOG 'pg-freeze: in the way of the thaw of %: %', the_token, found_;
    END;
    RETURN seen;
END $$;


-- One look of a watch: whether a thaw is due, and whoever is in its way. Takes what it has returned before.
CREATE OR REPLACE FUNCTION pgfreeze.watch_step(the_token uuid, the_pid integer, lease interval, so_far jsonb)
RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    since timestamptz;
    due   timestamptz;
BEGIN
    since := (SELECT a.backend_start FROM pg_stat_get_activity(the_pid) a JOIN pg_stat_get_activity(pg_backend_pid()) us
                  ON us.usesysid = a.usesysid);
    -- Another role's has got the process id of ours since, which is gone.
    IF since IS NULL OR since <> COALESCE((so_far ->> 'since')::timestamptz, since) THEN RETURN '{"over": true}'; END IF;
    so_far := so_far || jsonb_build_object('since', since);
    IF lease IS NULL THEN
        due := '-infinity';
    ELSE
        PERFORM set_config('lock_timeout', '100ms', true);
        BEGIN
            due := (SELECT CASE f.state WHEN 'thawing' THEN '-infinity' WHEN 'thawed' THEN 'infinity' ELSE f.lease_until END
                      FROM pgfreeze.freezes f WHERE f.token = the_token);
            so_far := so_far || CASE WHEN due IS NULL THEN jsonb_build_object('absent', clock_timestamp())
                                     ELSE jsonb_build_object('due', due) END;
        EXCEPTION WHEN lock_not_available THEN
            -- While the journal is locked nobody can change a lease. It may have been locked in the moment after the
            -- freeze began: then it was not there yet when we looked last.
            due := COALESCE((so_far ->> 'due')::timestamptz, (so_far ->> 'absent')::timestamptz + lease);
        END;
    END IF;
    IF due <= clock_timestamp() THEN
        RETURN so_far || jsonb_build_object('seen', pgfreeze.clear_way(the_token, the_pid, COALESCE(so_far -> 'seen', '{}')));
    END IF;
    -- What is needed to end somebody is read beforehand, and stays in the server's caches: when somebody has locked the
    -- catalogs of roles, it can no longer be read.
    PERFORM pg_get_userbyid(r.oid), pg_has_role(r.oid, 'USAGE'), has_table_privilege(r.oid, 'pgfreeze.freezes', 'UPDATE')
       FROM (SELECT DISTINCT a.usesysid FROM pg_stat_get_activity(NULL) a WHERE a.usesysid IS NOT NULL) AS r (oid);
    RETURN so_far - 'seen';
END $$;


-- Keep the way of one session of our own role clear, as long as it lives: a session that waits cannot ask who is in its
-- way. That is the dead-man switch of this freeze, once its lease is over or it helps with a thaw; or, without a lease,
-- another session that thaws.
--
-- No error ends it, nor pg_cancel_backend(): what can fail is in a block that catches that. Only a COMMIT may not be in one.
CREATE OR REPLACE PROCEDURE pgfreeze.watch(the_token uuid, the_pid integer, lease interval)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    so_far pg_catalog.jsonb;
BEGIN
    so_far := pg_catalog.jsonb_build_object('absent', pg_catalog.clock_timestamp());
    LOOP
        BEGIN
            so_far := pgfreeze.watch_step(the_token, the_pid, lease, so_far);
        EXCEPTION
            WHEN undefined_table OR undefined_column OR undefined_function OR invalid_schema_name THEN
                RAISE;   -- the journal is gone
            WHEN OTHERS OR query_canceled OR assert_failure THEN
                NULL;
        END;
        COMMIT;
        EXIT WHEN pg_catalog.jsonb_extract_path(so_far, 'over') IS NOT NULL;
        BEGIN
            PERFORM pg_catalog.pg_sleep(0.2);
        EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
            NULL;
        END;
        COMMIT;
    END LOOP;
END $$;


-- End the sessions of our own role that keep the way of this freeze's thaw clear: they would find out a moment later.
CREATE OR REPLACE FUNCTION pgfreeze.end_watch(the_token uuid)
RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT pg_terminate_backend(a.pid, 1000) FROM pg_stat_activity a
     WHERE a.application_name = 'pg-freeze watch ' || the_token AND a.usename = SESSION_USER
$$;


-- One step of the dead-man switch, in a transaction of its own. Takes what it has returned before: how long to sleep until the
-- next one ('nap', in seconds), how many attempts to thaw have failed, and where it is.
CREATE OR REPLACE FUNCTION pgfreeze.dead_man_step(the_token uuid, my_ticket bigint, so_far jsonb)
RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    f        pgfreeze.freezes;
    t        pgfreeze.tickets;
    nap      float8 := 0.5;
    failures integer := so_far ->> 'failures';
    reached  jsonb;
    left_    jsonb;
BEGIN
    IF so_far ? 'ending' THEN
        reached := pgfreeze.end_readers_step(the_token, interval '0', NULLIF(so_far -> 'ending', 'null'));
        IF reached ? 'done' THEN
            RETURN so_far - 'ending' || jsonb_build_object('nap', so_far -> 'then');
        END IF;
        RETURN so_far || jsonb_build_object('ending', reached, 'nap', CASE WHEN reached ? 'starting' THEN 0.05 ELSE 0 END);
    END IF;
    IF so_far ? 'leaving' THEN   -- in a transaction that has no lock on freezes yet: an upgrade of the journal locks tickets first
        so_far := so_far - 'leaving';
        LOCK TABLE pgfreeze.tickets IN SHARE ROW EXCLUSIVE MODE;
        PERFORM FROM pgfreeze.tickets WHERE ticket = my_ticket FOR UPDATE;
        IF EXISTS (SELECT FROM pgfreeze.freezes WHERE token = the_token) THEN
            RETURN so_far || '{"nap": 0}';
        END IF;
        UPDATE pgfreeze.tickets SET voided_at = clock_timestamp() WHERE ticket = my_ticket AND voided_at IS NULL;
        RETURN '{"over": true}';
    END IF;
    SELECT * INTO f FROM pgfreeze.freezes WHERE token = the_token;
    IF f.token IS NULL THEN
        -- Nothing frozen yet. Void the ticket before leaving, so that its owner cannot freeze unwatched.
        SELECT * INTO t FROM pgfreeze.tickets WHERE ticket = my_ticket;
        IF t.voided_at IS NOT NULL OR (so_far ->> 'until')::timestamptz < clock_timestamp() THEN
            RETURN so_far || '{"leaving": true, "nap": 0}';
        END IF;
    ELSIF f.state = 'thawed' THEN
        IF f.strategy = 'privileges' THEN   -- another role's thaw could not
            PERFORM set_config('lock_timeout', '4s', true);
            BEGIN
                PERFORM pgfreeze.sweep_marks();
            EXCEPTION WHEN lock_not_available OR deadlock_detected OR internal_error THEN
                -- Somebody is in the way. Nothing is frozen, so nobody has to go for that.
                RETURN so_far || jsonb_build_object('nap', nap);
            END;
        END IF;
        RETURN '{"over": true}';
    ELSIF f.state = 'frozen' AND NOT pgfreeze.locked(f.sessions) THEN
        -- Its holder died, and the locks with it: what is left is to say so.
        PERFORM pgfreeze.restore_settings(the_token, 'lock session ended');
        RETURN so_far || jsonb_build_object('ending', NULL, 'nap', 0, 'then', nap);
    ELSIF f.lease_until <= clock_timestamp()
          -- Somebody else's thaw could not restore all, or ended before it was done.
          OR f.state = 'thawing' AND (EXISTS (SELECT FROM pgfreeze.frozen_databases b WHERE b.token = the_token AND b.active)
                                      OR NOT EXISTS (SELECT FROM pgfreeze.thaws() a WHERE a.asked)) THEN
        -- At first nobody is waited for; then long enough for the watch to see who is in the way. Not for ever: meanwhile
        -- nobody else could thaw either.
        PERFORM set_config('lock_timeout', CASE failures WHEN 0 THEN '200ms' ELSE '4s' END, true);
        BEGIN
            left_ := pgfreeze.restore_settings(the_token, 'lease ended', only_expired => true);
            failures := CASE WHEN left_ = '[]' THEN 0 ELSE failures + 1 END;
        EXCEPTION WHEN OTHERS THEN
            failures := failures + 1;
            RAISE WARNING 'the dead-man switch of % tries again: %', the_token, SQLERRM;
        END;
        -- Somebody else may have begun to thaw who could not give back all that was revoked.
        nap := CASE WHEN failures > 20 THEN 5 WHEN f.state = 'thawing' THEN 1 ELSE 0.1 END;
        so_far := so_far || jsonb_build_object('failures', failures, 'nap', nap);
        IF f.lease_until <= clock_timestamp() OR f.strategy = 'privileges'
           OR NOT EXISTS (SELECT FROM pgfreeze.thaws() a WHERE a.asked) THEN   -- else whoever thaws may have granted readers a while
            so_far := so_far || jsonb_build_object('ending', NULL, 'nap', 0, 'then', nap);
        END IF;
        RETURN so_far;
    ELSE
        nap := LEAST(nap, EXTRACT(epoch FROM f.lease_until - clock_timestamp()));
    END IF;
    RETURN so_far || jsonb_build_object('nap', nap);
END $$;


-- The dead-man switch: runs in a session of its own, which its client leaves behind. It is there before the freeze
-- is, so that no death of the pause can leave a freeze unwatched; it outlives its client, since a server process
-- that runs a statement does not look at its socket (client_connection_check_interval = 0).
--
-- No error ends it, nor pg_cancel_backend(): what can fail is in a block that catches that. Only a COMMIT may not be in one.
CREATE OR REPLACE PROCEDURE pgfreeze.dead_man(the_token uuid, my_ticket bigint, patience interval)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    so_far pg_catalog.jsonb;
BEGIN
    so_far := pg_catalog.jsonb_build_object(
        'failures', 0, 'until', pg_catalog.timestamptz_pl_interval(pg_catalog.clock_timestamp(), patience));
    LOOP
        BEGIN
            so_far := pgfreeze.dead_man_step(the_token, my_ticket, so_far);
        EXCEPTION
            WHEN undefined_table OR undefined_column OR undefined_function OR invalid_schema_name THEN
                RAISE;   -- the journal is gone
            WHEN OTHERS OR query_canceled OR assert_failure THEN
                so_far := pg_catalog.jsonb_build_object('failures', pg_catalog.jsonb_extract_path(so_far, 'failures'),
                                                        'until', pg_catalog.jsonb_extract_path(so_far, 'until'), 'nap', 0.5);
                RAISE WARNING 'the dead-man switch of % goes on: %', the_token, SQLERRM;
        END;
        COMMIT;
        EXIT WHEN pg_catalog.jsonb_extract_path(so_far, 'over') IS NOT NULL;
        BEGIN
            PERFORM pg_catalog.pg_sleep(GREATEST(0.01, pg_catalog.jsonb_extract_path_text(so_far, 'nap')::pg_catalog.float8));
        EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN
            NULL;
        END;
        COMMIT;
    END LOOP;
    PERFORM pgfreeze.end_watch(the_token);
END $$;
