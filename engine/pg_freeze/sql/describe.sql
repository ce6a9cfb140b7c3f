-- What a program is told of a freeze. Runs after install.sql.
--
-- A program of another version calls these too: status, resume and guard work with every journal. So each tells all that
-- there is as one JSON object. A key that is new is nothing to an older program; a key that is there stays what it is.

CREATE OR REPLACE FUNCTION pgfreeze.described(f pgfreeze.freezes)
RETURNS jsonb
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp SET "TimeZone" = 'UTC' SET "DateStyle" = 'ISO, MDY' AS $$
    SELECT (to_jsonb(f) - 'older' - 'sessions') || jsonb_build_object(
        'locked', pgfreeze.locked(f.sessions) OR f.state NOT IN ('draining', 'frozen'),
        'left_over', CASE f.state WHEN 'thawing' THEN f.left_over ELSE '[]' END,
        'in_the_way', (SELECT COALESCE(jsonb_agg(to_jsonb(k) - 'token' || jsonb_build_object('there', CASE k.pid
                               WHEN 0 THEN EXISTS (SELECT FROM pg_prepared_xacts p
                                                    WHERE p.gid = k.application AND p.database = k.database)
                               ELSE EXISTS (SELECT FROM pg_stat_get_activity(k.pid) a WHERE COALESCE(a.backend_start = k.backend_start, true))
                               END) ORDER BY k.seen_at), '[]')
                         FROM pgfreeze.blockers k WHERE k.token = f.token),
        'dropped', ARRAY(SELECT b.name FROM pgfreeze.frozen_databases b
                          WHERE b.token = f.token AND b.database NOT IN (SELECT oid FROM pg_database WHERE datconnlimit <> -2)),
        'dead_man_pid', (SELECT d.pid FROM pgfreeze.dead_men() d WHERE d.token = f.token AND f.state <> 'thawed' LIMIT 1))
     WHERE f.token IS NOT NULL
$$;


-- The freezes that are not thawed to the end, of any of these databases or (NULL) of all, oldest first. Also (former) that of a
-- database which was renamed while it was frozen, although there is another one under its former name now, that is not frozen.
CREATE OR REPLACE FUNCTION pgfreeze.open_freezes(names text[] DEFAULT NULL, former boolean DEFAULT false)
RETURNS SETOF jsonb
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT pgfreeze.described(f) FROM pgfreeze.freezes f
     WHERE f.state <> 'thawed' AND (names IS NULL OR EXISTS (
           SELECT FROM pgfreeze.frozen_databases b LEFT JOIN pg_database d ON d.oid = b.database
            WHERE b.token = f.token AND (d.datname::text = ANY (names)
               -- By its former name only if that is no other database's now.
               OR b.name = ANY (names)
                  AND NOT EXISTS (SELECT FROM pg_database o
                                   WHERE o.datname::text = b.name AND o.oid <> b.database
                                     AND NOT (former AND d.oid IS NOT NULL
                                              AND NOT EXISTS (SELECT FROM pgfreeze.frozen_databases n
                                                               WHERE n.database = o.oid AND n.active))))))
     ORDER BY f.requested_at
$$;


-- One freeze, whatever its state; NULL if it was never journalled, or is forgotten.
CREATE OR REPLACE FUNCTION pgfreeze.freeze_of(the_token uuid)
RETURNS jsonb
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT pgfreeze.described(f) FROM pgfreeze.freezes f WHERE f.token = the_token
$$;

-- Last of all, for what the files before have made as well.
REVOKE ALL ON ALL TABLES IN SCHEMA pgfreeze FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA pgfreeze FROM PUBLIC;
