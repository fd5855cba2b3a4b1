"""From the job's key to hidden units: keyed draws, and what a set of units means for a tensor.

job_key.py    the key file: the secret, p1 and the plan of a job
draw.py       HMAC-SHA256 and SHAKE-256 decide which units are hidden
shake256.py   SHAKE-256 as a stream, for groups whose ranks do not fit memory
unit_mask.py  a set of units of one tensor: its rows, columns, elements and blocks
job_masks.py  the server mask and the client masks of a job, tensor by tensor
"""
