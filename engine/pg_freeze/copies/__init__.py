"""Copies of a data directory: hostile until shown otherwise.

The code, the settings and the links in a copy belong to whoever wrote them. So nothing in here believes a copy:

``tree.py``     looks for what leads out of the copy, and gives its files to a user id of its own for the time;
``running.py``  refuses a directory that a server may run on;
``aside.py``    takes away, for the time, what would tell the server where else to read, write or run something;
``jail.py``     runs a program where it sees the copy, PostgreSQL's programs, and nothing else;
``server.py``   starts PostgreSQL so, with settings of ours, and connects to it;
``frozen.py``   reads the journal's rows as data, and thaws with statements of ours;
``wal.py``      finds row changes in the copy's own WAL;
``lsns.py``     finds files that are from later than the WAL, before a server runs on them;
``prepared.py`` finds prepared transactions that were lost;
``xact.py``     finds transactions of which nobody knows how they ended;
``checksums.py`` has pg_checksums check each page;
``relations.py`` what tables and indexes there are;
``rows.py``     checks them against each other, with ``pages.py`` for empty pages;
``structure.py`` has amcheck look inside them.
"""
