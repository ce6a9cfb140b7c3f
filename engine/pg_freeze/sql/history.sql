-- What of the history may go. Runs after install.sql.

-- Forget the freezes that were thawed longer than this ago, with all that belongs to them, and return how many they were.
-- Of those that are as old, some are kept, and these are counted, too:
--   still_open: something of it is not thawed after all;
--   leased: its lease has not ended yet, and its dead-man switch may still read it;
--   attested: it was attested since.
-- Only the owner of the journal may DELETE here.
--
-- Tickets keep a late attempt from freezing after its resume. So they are kept for 30 days at least.
--   SELECT * FROM pgfreeze.forget(interval '90 days');
CREATE OR REPLACE FUNCTION pgfreeze.forget(age interval, OUT forgotten bigint, OUT still_open bigint, OUT leased bigint,
                                           OUT attested bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_   constant timestamptz := clock_timestamp();
    since  constant timestamptz := now_ - age;
    old    uuid[];
BEGIN
    IF age IS NULL OR age <= interval '0' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'the age of what is forgotten must be more than zero';
    END IF;
    SELECT COALESCE(array_agg(k.token) FILTER (WHERE k.why = 'none'), '{}'), count(*) FILTER (WHERE k.why = 'open'),
           count(*) FILTER (WHERE k.why = 'lease'), count(*) FILTER (WHERE k.why = 'attested')
      INTO old, still_open, leased, attested
      FROM (SELECT f.token,
                   CASE WHEN EXISTS (SELECT FROM pgfreeze.frozen_databases b WHERE b.token = f.token AND b.active) THEN 'open'
                        WHEN f.lease_until > now_ THEN 'lease'
                        WHEN EXISTS (SELECT FROM pgfreeze.attestations a
                                      WHERE a.token = f.token AND GREATEST(a.before_at, a.after_at) >= since) THEN 'attested'
                        ELSE 'none' END
              FROM pgfreeze.freezes f
             WHERE f.state = 'thawed' AND GREATEST(f.requested_at, f.thawed_at) < since) k (token, why);
    DELETE FROM pgfreeze.attestations a WHERE a.token = ANY (old);
    DELETE FROM pgfreeze.blockers k WHERE k.token = ANY (old);
    DELETE FROM pgfreeze.revoked v WHERE v.token = ANY (old);
    DELETE FROM pgfreeze.prior_settings p WHERE p.token = ANY (old);
    DELETE FROM pgfreeze.frozen_databases b WHERE b.token = ANY (old);
    DELETE FROM pgfreeze.freezes f WHERE f.token = ANY (old);
    DELETE FROM pgfreeze.tickets t
     WHERE t.drawn_at < LEAST(since, clock_timestamp() - interval '30 days')
       AND NOT EXISTS (SELECT FROM pgfreeze.freezes f WHERE f.ticket = t.ticket);
    forgotten := cardinality(old);
END $$;
