"""Checkpoints on disk: strict reading, all-or-nothing writing, and where they come from.

files.py      plain files: opened with limits, replaced and locked
secret_files.py  files that only their owner can open
companions.py  the files of a tokenizer beside a model
companion_limits.py  how much they may say before they could carry weights
header.py     one safetensors header, read strictly or planned ahead
direct_io.py  reading around the page cache
in_order.py  plain files from beginning to end, around the page cache and ahead of their reader
descriptors.py  which files are open for reading
model_config.py  config.json: types, and sizes against the tensors
reader.py     config, index and shards -> tensors, whole or in chunks
stream.py     background threads that write and hash
tensor_sink.py  the tensors of a folder on their way into files
writer.py     a directory of tensors and small files, published with one rename
source.py     a path or hf://owner/name[@revision] -> a local path, and back
"""

from __future__ import annotations

from fedqsn_cli.checkpoint.files import write_file_atomically
from fedqsn_cli.checkpoint.header import Header, TensorEntry, TensorSpec, plan_file, read_header
from fedqsn_cli.checkpoint.reader import Checkpoint
from fedqsn_cli.checkpoint.secret_files import create_secret
from fedqsn_cli.checkpoint.source import Source, check_reference, push, resolve
from fedqsn_cli.checkpoint.stream import WriterThreads, allow_open_files
from fedqsn_cli.checkpoint.tensor_sink import FolderWriter, TensorSink
from fedqsn_cli.checkpoint.writer import FILE_MODE, FILE_TIME, ArtifactWriter

__all__ = [
    "FILE_MODE",
    "FILE_TIME",
    "ArtifactWriter",
    "Checkpoint",
    "FolderWriter",
    "Header",
    "WriterThreads",
    "Source",
    "TensorEntry",
    "TensorSink",
    "TensorSpec",
    "allow_open_files",
    "check_reference",
    "create_secret",
    "plan_file",
    "push",
    "read_header",
    "resolve",
    "write_file_atomically",
]
