"""Merging what clients sent back.

update.py      read an update without trusting it
accumulate.py  the arithmetic, compiled
merge.py       GLOBAL + updates -> NEXT, chunk by chunk
restore.py     trained visible part + hidden part -> the whole model
"""
