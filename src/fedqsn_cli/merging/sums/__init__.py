"""Exact sums of updates, compiled.

exact_sum.py      sums that depend neither on the order nor on the grouping of their terms
arithmetic.py     the sums
stepping.py       the step
average_kernel.py the average of a few updates and its step, in the cache
"""
