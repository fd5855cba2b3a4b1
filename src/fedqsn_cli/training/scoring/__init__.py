"""What a model says about data.

one_by_one.py      batches that give what each example alone would
scoring.py         loss and measures of a model
generation.py      texts that a model writes, and their measures
teachers.py        what models say about texts, and a student's distance from it
"""
