"""What proxies give away, held against a policy.

findings.py      findings, checks and measures as values
policy.py        what a policy may limit and require
registry.py      what a rule is: id, severity, needs, what, why and how to fix it
completeness.py  FQ901 to FQ905, and where findings and checks are collected
opened_proxy.py  one proxy, opened for inspection
stored_rows.py   rows of weights as they are stored: floats, or codes with their scales
inputs.py        everything an audit opens: proxies, and the owner's side as far as it is given
outbox.py        the proxies of a round, found by the ledger
digests.py       SHA-256 of the files of proxies
checks.py        how a check is run over proxies, with the inputs that it needs
rows.py          rows of models and proxies side by side
kernels.py       compiled comparisons
truth_pass.py    one pass over the truth for all that looks at its weights
invariants/      the hard rules
recovery/        attacks on weights and function
limits/          measurements held against the policy
rules.py         all rules and checks, in their order
policy_file.py   policy.toml, read and written
gate.py          limits, what is required, and waivers: verdict and exit code
report/          the seven formats
attest.py        the verdict, signed
targets.py       where an audit may write
run.py           the command audit
"""
