"""Onboarding Sessions: answers in, generation out.

A person fills the steps of a wizard; the service keeps them safe and says how far they are;
finalize freezes them into an export; a generator turns the export into a document.

    request -> api -> services -> store -> Redis      imports point one way:
                |        |          |                 api -> services -> store -> onboarding
                '--------+----------'--> onboarding   everyone may use: errors, clock

    onboarding/   the rules: what a session is, what may happen to it, what it looks like. Pure
    store/        every key, every Lua script, every retry, the embedded server
    services/     the use cases: check with the rules, call the store, log, return
    api/          HTTP: one table of operations routes, checks and documents every call

    settings      the environment, read once          address   where the store is, from a URL
    errors        everything that can go wrong        clock     the only place that asks the time
    context       the world of one request            logs      one event a line
    metrics       what is measured, and how it is told
    wiring        which object gets which other       main      the ASGI application
    server        uvicorn, with what it says by itself said our way
    protocol      HTTP on a connection, with less to do for a plain request
    __main__      the process: store first up, last down
    client        the service over HTTP, for generators elsewhere
    generator     a generator to begin one's own with
    keys          makes the key of a machine
    testing       a manager on a store that is thrown away, for the tests of others

What happens in a session is one log, written by the scripts that change it. A live stream is a
place in that log: `store/subscription` hears on one connection that a log has grown, and the
follower (`services/events`) reads on from its place. Nothing is passed on by memory, so nothing can
be lost, come twice, or pile up for a slow reader. While nothing happens, all that is left of a
stream waits for its client to leave (`api/events`); one timer serves all of them.

Every command of an event loop goes over one connection, gathered by turns of the loop
(`store/multiplex`): what each request would pay for a pool is ten times what the store takes to
answer. Only what keeps a server waiting, and the parts of large bodies, has connections of its own
(`store/links`). A request that names a session in the plain way is served without the layers that
stand around the others (`api/fastpath`), by the same checks and handlers.

All sessions are listed, counted and chosen for removal from one index (`store/lua/index.lua`). The
script that changes a session keeps it true in the same step; on a Cluster it follows within a
second (`store/index`). The sweeper mends it in both: the index is a hint, the session the truth.

Who asks is known by what they show (`services/access`, `services/keyring`), and what they may, by
one table (`onboarding/access`). One middleware asks both before anything of a request is looked at
(`api/access`); whose a session is, is asked where it would be looked up, after path, headers and
body. What was refused, and what matters, goes on record behind the requests (`services/audit`).

Questions about the wizard are answered by an agent (`onboarding/assistant`), ours or a deployer's:
it is made for one question and runs in a task of its own, so that it is closed whatever becomes of
the request. Ours looks answers up in the help texts (`onboarding/guide`).

What a caller may ask for is kept in buckets of tokens in the store, one for each caller and limit.
A process takes some at a time and spends them (`services/limits`), since a command for every
request would cost as much as the request.

A feature has the same file name in every ring it lives in (`ls app/*/steps.*`); the manager has all
of them, because callers know one class by that name. The JSON that is kept exactly is a rule of its
own (`onboarding/documents`), because HTTP and Python callers are held to the same one; `address`
stands beside `settings`, because a bad URL is a bad setting, found before Redis is.
"""

__version__ = "0.1.0"
