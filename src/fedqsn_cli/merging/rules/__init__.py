"""How the updates of a round are put together, an average or a rule that withstands some of them.

order_rules.py    rules that put the values of one weight in order: median, trimmed mean
chunk_stack.py    one chunk of all updates side by side
distances.py      how far apart updates are
client_weights.py rules that decide what each update counts: krum, geometric median
survey.py         a pass before a merge, where updates must be known beforehand
aggregation.py    the rule of a round, and what each update counts in it
"""
