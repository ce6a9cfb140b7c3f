-- What of the history may go. Runs after install.sql.

-- Forget the freezes that were thawed longer than this ago, with their attestations, and return how many they were. Never
-- one that is open in any part, or that was attested since. Only the owner of the journal may DELETE here.
--
-- Tickets keep a late attempt from freezing after its resume. So they are kept for 30 days at least.
--   SELECT pgfreeze.forget(interval '90 days');
CREATE OR REPLACE FUNCTION pgfreeze.forget(age interval)
RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    since  constant timestamptz := clock_timestamp() - age;
    old    uuid[];
BEGIN
    IF age IS NULL OR age <= interval '0' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'the age of what is forgotten must be more than zero';
    END IF;
    old := ARRAY(SELECT f.token FROM pgfreeze.freezes f
                  WHERE f.state = 'thawed' AND GREATEST(f.requested_at, f.thawed_at, f.lease_until) < since
                    AND NOT EXISTS (SELECT FROM pgfreeze.frozen_databases b WHERE b.token = f.token AND b.active)
                    AND NOT EXISTS (SELECT FROM pgfreeze.attestations a
                                     WHERE a.token = f.token AND GREATEST(a.before_at, a.after_at) >= since));
    DELETE FROM pgfreeze.attestations a WHERE a.token = ANY (old);
    DELETE FROM pgfreeze.blockers k WHERE k.token = ANY (old);
    DELETE FROM pgfreeze.revoked v WHERE v.token = ANY (old);
    DELETE FROM pgfreeze.prior_settings p WHERE p.token = ANY (old);
    DELETE FROM pgfreeze.frozen_databases b WHERE b.token = ANY (old);
    DELETE FROM pgfreeze.freezes f WHERE f.token = ANY (old);
    DELETE FROM pgfreeze.tickets t
     WHERE t.drawn_at < LEAST(since, clock_timestamp() - interval '30 days')
       AND NOT EXISTS (SELECT FROM pgfreeze.freezes f WHERE f.ticket = t.ticket);
    RETURN cardinality(old);
END $$;
