"""Who has seen which share of the model, computed from ledger and key alone.

Built for a thousand clients in a hundred rounds of a model with some 20,000 units, in seconds: whether a release is
within its budget is asked before every export. Of 100,000 masks few have to be drawn, because a client that has seen
everything needs no more; eight are drawn with one instruction; of coalitions too many to try, the worst found is
reported with a bound that no other exceeds. A job of ten clients needs none of this, and loses nothing by it.

results.py     exposure of clients and coalitions as values
expected.py    what fresh proxies show on average, by arithmetic
history.py     releases by client, and how many of their masks are drawn again
replay.py      the masks of released proxies drawn again, many at once
coalitions.py  the clients that together have seen most
exposure.py    exposure of every client after every release
budget.py      refuse a release that would exceed a budget
"""
