"""The rules FQ101 to FQ302: what was measured, held against what a policy allows.

measured.py     everything that was measured, and how a value is held against its limit
exposure.py     FQ101 to FQ103: what clients and coalitions have seen
options.py      FQ105: options of releases that nobody need have asked for
companions.py   FQ104: files beside the weights that could carry weights
recovery.py     FQ201 to FQ204: recovered weights
function.py     FQ301 and FQ302: the recovered function
regression.py   FQ205: nothing is worse than in the baseline
"""
