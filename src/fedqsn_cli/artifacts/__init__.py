"""Every file that fedqsn writes beside tensors.

document.py       JSON documents of known fields, read without trust
manifests.py      fedqsn.json, proxy.json, update.json
proxy_folder.py   the units that a proxy shows; whether its files are the owner's
ledger_head.py    where a ledger ends, sealed under the keys of its jobs
ledger.py         the append-only record of releases
update_folder.py  the shape of an update
partial_folder.py a partial sum of updates
sanitize.py       config and companion files without anything private
"""
