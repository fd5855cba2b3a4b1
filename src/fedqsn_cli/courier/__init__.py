"""Proxies to the sites and updates back, by NVIDIA FLARE (extra: flare). Only `flare/` imports it.

FLARE carries sealed files and decides nothing: it never sees a weight, a key or a plain proxy.

layout.py    the folders of the owner and of a site, and the invitation that joins them
parts.py     a file in parts with digests, and a download that goes on where it was
orders.py    what the owner asks of a site, signed: a proxy, part by part, and a training
site.py      site.toml: what a site trains with, and what it lets the owner ask for
kits.py      FLARE's certificates and start-up kits, and their settings
daemons.py   the processes that serve: started again when they die, ended together
setup.py     `courier-init`, `courier-join`, `courier-approve`
outbox.py    `courier-pack`: sealed proxies and orders, with nothing that the courier's host may not see
work.py      what a site does with an order: fetch, open, train in a child process, seal
rounds.py    what is sent to each client, and what is taken for an answer
send.py      `courier-send`
serve.py     `courier-serve`, `courier-stop`, `courier-status`
flare/       the classes that FLARE runs, and the owner's session
"""
