"""What clients sent back: read once, and refused where it does not belong to the round.

stored_values.py  where U is in a file, as values or as codes
products.py       products of two factors, compiled
adapter_config.py the configuration of adapters, which may say nothing else
adapters.py       U of adapters: products of factors, rows of them as they are asked for
measures.py       what is measured of an update while its values are read
refusals.py       updates that are refused end the merge, or are noted
file_hash.py      a file that is read in pieces, and its digest
read_update.py    an update, and its values read once
partial_sum.py    a sum of some updates that is merged on
verify.py         which updates and partial sums belong to the round
admission.py      which updates of a round are merged: claims and norms
"""
