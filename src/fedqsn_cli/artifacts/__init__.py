"""Every file that fedqsn writes beside tensors.

manifests.py      fedqsn.json, proxy.json, update.json
ledger.py         the append-only record of releases
update_folder.py  the shape of an update
sanitize.py       config and companion files without anything private
"""
