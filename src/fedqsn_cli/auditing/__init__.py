"""What proxies give away, held against a policy.

inputs.py        everything an audit opens: proxies, and the owner's side as far as it is given
opened_proxy.py  one proxy, opened for inspection
findings.py      findings, checks and measures as values
rules.py         every rule: id, severity, what, why and how to fix it
rows.py          rows of models and proxies side by side
kernels.py       compiled comparisons
secrets.py       secrets, paths and host names in files
invariants/      the hard rules
recovery/        attacks on weights and function
policy.py        limits, and what must have been checked (policy.toml)
gate.py          findings and measures held against the policy: verdict and exit code
report/          the seven formats
run.py           the command audit
"""
