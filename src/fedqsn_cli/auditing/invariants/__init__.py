"""The hard rules FQ001 to FQ011: a proxy that breaks one must not be sent.

check.py            all of them, in the order in which a failed one explains the next
contents.py         files, manifests and secrets
masks.py            the masks are those of the key, the ratios those of the job
weak_seeds.py       masks that a seeded generator could have drawn
rebuild.py          every byte of the tensors, made again from the truth
holes.py            what is stored where units are hidden
same_codes.py       two proxies of one round agree wherever both show a unit
sketches.py         sketches of units, to find near copies among millions
copied_units.py     hidden units that appear elsewhere in a proxy
merge_integrity.py  hidden units of a merged model are unchanged
server_holes.py     what is stored in the holes of a server model
"""
