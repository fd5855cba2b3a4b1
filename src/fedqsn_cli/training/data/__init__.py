"""From data files to what a model takes, and what each task learns of it.

tables.py          the columns of a data file
data_files.py      a JSONL, JSON, CSV or Parquet file -> columns
parquet.py         the columns of a Parquet file
stored_examples.py  examples in memory or in a file, read one at a time
examples.py        what a model takes, and what the loss counts
tokenizing.py      texts -> token ids
labelled.py        rows with labels -> examples
chat.py            conversations -> token ids
language.py        rows for language models -> examples
losses.py          the loss of each task
metrics.py         the measures of each task
tasks.py           the table of tasks: columns, targets, loss, measures
encoder.py         rows -> examples, for one model
shown.py           examples for people to look at
"""
