"""The demo: a trading app on a server of its own, arbiter installed on it, the whole story played.

``story`` plays it in a terminal and ``web`` in a browser; ``embedded`` and ``gateway`` start the
server and PostgREST, for the tests too.
"""
