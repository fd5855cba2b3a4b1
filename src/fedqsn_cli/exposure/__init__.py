"""Who has seen which share of the model, computed from ledger and key alone.

results.py     exposure of clients and coalitions as values
replay.py      draw the masks of released proxies again, many at once
coalitions.py  the clients that together have seen most
exposure.py    exposure of every client after every release
budget.py      refuse a release that would exceed a budget
"""
