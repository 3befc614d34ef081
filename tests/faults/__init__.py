"""Make a store, a network or a service fail, and count what that costs whom.

`servers` starts, kills and freezes real servers, `states` fills, demotes and locks one, `hosts` and
`shards` are sets that fail over; `proxy` breaks the way to one, and `http_proxy` the way to the
service; `load` writes meanwhile and remembers what was acknowledged.
What the tests here find is one row each of the table that `make chaos` prints; `make test` runs
those that take seconds, once.
"""
