"""From names, shapes and config.json to a plan: the role, units and mask group of every tensor; no weight is read.

roles.py         which tensor is what: the table of roles (rules.toml)
placement.py     --where, --layers, --p1-schedule: what is hidden, and how much of it
overrides.py     the user's own rules (--plan-file FILE)
tied.py          tensors that share one storage, and so one mask
tensor_plan.py   what the plan says about one tensor
plan.py          the plan of a whole checkpoint
skip_modules.py  the modules that transformers must not quantize again on loading
"""
