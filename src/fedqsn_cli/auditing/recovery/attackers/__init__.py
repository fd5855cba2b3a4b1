"""Attackers who want the model's function: each attack is one file, with the work that describes it.

attack.py       what an attack is: weights to start from, or a way to train them
assembly.py     models that can be put together from proxies and the public base
evaluation.py   the owner's examples, and how good a model is on them
as_sent.py      start: the proxy as it was sent
union.py        start: what all proxies show together, zero elsewhere
base_fill.py    start: the same, the public base elsewhere
averaging.py    start: rounding undone by all proxies that show a weight, the public base elsewhere
rounds.py       start: rounds together, averaged or subtracted
direction.py    start: each unit's direction from the proxies, its length from the public base
full.py         training: every weight
low_rank.py     training: low-rank adapters on every linear layer
healing.py      training: only what no proxy shows
distillation.py training: first agree with the proxy on public examples, then every weight
catalogue.py    all of them, in the order in which they are tried
"""
