"""Make a store, a network or a service fail, and count what that costs whom.

`servers` kills, freezes, fills and demotes real servers; `proxy` breaks the way to one, and
`http_proxy` the way to the service; `load` writes meanwhile and remembers what was acknowledged.
What the tests here find is one row each of the table that `make chaos` prints; `make test` runs
those that take seconds, once.
"""
