"""Every file that fedqsn writes beside tensors.

manifests.py  fedqsn.json, proxy.json, update.json
ledger.py     the append-only record of releases
sanitize.py   config and companion files without anything private
"""
