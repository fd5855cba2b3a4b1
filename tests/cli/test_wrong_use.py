"""Wrong use of every command: one clear line that names the option and the fix, exit code 2, nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fedqsn_cli.cli.app import COMMANDS
from support.processes import Outcome, process, run

MASK = "mask model --out out --key job.key --p1 0.1"
QUANTIZE = "quantize model --out out --format nf4"
EXPORT = "export-proxy model --out out --client alice --round 1 --p1 0.1 --p2 0.1 --key job.key --ledger ledger.jsonl"
TRAIN = "client-train proxy --out out --data train.jsonl"
MERGE = "merge model update --out out --key job.key --ledger ledger.jsonl"
EVALUATE = "evaluate model --data dev.jsonl"
INSPECT = "inspect model"

WRONG = [
    ("", "a command is missing; choose from mask, quantize,"),
    ("courier", "a command is missing after 'courier'; choose from init, join,"),
    ("courier sned", "no such command 'courier sned'; did you mean 'courier send'?"),
    ("courier frobnicate", "no such command 'courier frobnicate'; choose from init, join,"),
    ("help courier frobnicate", "no such command 'courier frobnicate'; choose from init, join,"),
    ("msk", "no such command 'msk'; did you mean 'mask'?"),
    ("frobnicate", "no such command 'frobnicate'; choose from mask,"),
    ("--frob", "no such option --frob; see 'fedqsn --help'"),
    (MASK.replace("--key", "--kye"), "no such option --kye; did you mean --key?"),
    (f"{MASK} -x", "no such option -x; see 'fedqsn mask --help'"),
    ("mask model --key job.key", "missing --out; see 'fedqsn mask --help'"),
    ("mask --out out --key job.key", "missing CHECKPOINT; see 'fedqsn mask --help'"),
    (f"{MASK} second", "unexpected argument second; see 'fedqsn mask --help'"),
    (f"{MASK} --p1", "--p1: needs a value; see 'fedqsn mask --help'"),
    (f"{MASK} --axis --force", "--axis: needs a value; see 'fedqsn mask --help'"),
    (f"{MASK} --force=yes", "--force: takes no value; see 'fedqsn mask --help'"),
    (f"{MASK} --json -q", "--json, --quiet: cannot be given together; choose one"),
    ("mask model --out '' --key job.key", "--out: is empty;"),
    ("mask model --out hf://o/m --key job.key", "--out: hf://o/m is not a path on this machine; give a file or folder"),
    ("seal hf://o/m --to owner.pub --out x", "PATH: hf://o/m is not a path on this machine; give a file or folder"),
    ("unseal hf://o/m --key owner.key --out x", "FILE: hf://o/m is not a path on this machine;"),
    ("keygen hf://o/m", "KEY: hf://o/m is not a path on this machine;"),
    ("courier init hf://o/m --key owner.pub", "COURIER: hf://o/m is not a path on this machine;"),
    ("courier init c --key owner.pub --local ann --local ann", "--local: a client is named twice"),
    ("courier init c --key owner.pub --local a.b", "--local: 'a.b' cannot be the name of a site; use letters, digits,"),
    ("courier init c --key owner.pub --local Server", "--local: 'Server' cannot be the name of a site;"),
    ("courier init c --key owner.pub --local LocalHost", "--local: 'localhost' is the name of the server;"),
    ("courier init c --key owner.pub --server [::1]:80", "--server: '[::1]' is not the name of a host;"),
    ("courier join i.json --out s --name admin --data x", "--name: 'admin' cannot be the name of a site;"),
    ("courier send c outbox --into in --deadline 6x", "--deadline: '6x' is not a time; give a time such as 30m or 6h"),
    ("courier send c outbox --into in --deadline 6", "--deadline: '6' is not a time; give a time such as 30m or 6h"),
    (EXPORT.replace("--out out", "--out x/{clnt}"), "--out: '{clnt}' is no placeholder; the only one is {client}"),
    (EXPORT.replace("--out out", "--out x/{client"), "--out: '{client' is no placeholder; the only one is {client}"),
    (EXPORT.replace("--out out", "--out '{client}-{}'"), "--out: '{}' is no placeholder; the only one is {client}"),
    (f"{EXPORT} --push hf://o/{{Client}}", "--push: '{Client}' is no placeholder; the only one is {client}"),
    (f"{MERGE} --verify-key keys/{{name}}.pub", "--verify-key: '{name}' is no placeholder; the only one is {client}"),
    ("mask '' --out out --key job.key", "CHECKPOINT: is empty;"),
    ("mask 'm\udcff' --out out --key job.key", r"CHECKPOINT: 'm\udcff' is not UTF-8 text; rename it"),
    ("keygen /", "/: is a directory; name a file"),
    ("keygen .", ".: is a directory; name a file"),
    (f"{MASK} --max-shard-size {'9' * 400}TB", f"--max-shard-size: '{'9' * 400}TB' is not a size; give a size"),
    (f"{TRAIN} --save-every {'9' * 500}", f"--save-every: '{'9' * 500}' is neither a number of steps nor a time;"),
    (f"{MASK} --p1 1.5", "--p1: 1.5 is out of range; give a number from 0 to 1"),
    (f"{MASK} --p1 -0.1", "--p1: -0.1 is out of range; give a number from 0 to 1"),
    (f"{MASK} --p1 nan", "--p1: nan is out of range;"),
    (f"{MASK} --p1 many", "--p1: 'many' is not a number;"),
    (f"{MASK} --axis row", "--axis: 'row' is not a choice; choose from neuron, input, element"),
    (f"{MASK} --fill zeros", "--fill: 'zeros' is not a choice; did you mean zero?"),
    (f"{MASK} --where output", "--where: 'output' is not a choice; did you mean outputs?"),
    (f"{MASK} --layers 3-1", "--layers: '3-1' is neither a layer nor a range of layers; list layers as in"),
    (f"{MASK} --layers ''", "--layers: '' is neither a layer nor a range"),
    (f"{MASK} --p1-schedule 0-2", "--p1-schedule: '0-2' has no ratio; write a schedule as in 0-2=0.9"),
    (f"{MASK} --p1-schedule 0-2=0.9,2=0.5", "--p1-schedule: layer 2 is given two ratios"),
    (f"{MASK} --p1-schedule 0=1", "--p1-schedule: 1.0 is not a ratio; give a number from 0"),
    (f"{MASK} --preset weak", "--preset: 'weak' is not a choice; choose from paper, strong"),
    (f"{MASK} --preset strong", "--public-base: --fill base needs the public base; preset strong fills the holes"),
    (f"{EXPORT} --preset strong", "--public-base: --fill base needs the public base; preset strong fills the holes"),
    (f"{EXPORT} --layers x", "--layers: 'x' is neither a layer nor a range of layers;"),
    (f"{MASK} --max-shard-size big", "--max-shard-size: 'big' is not a size;"),
    (f"{MASK} --client a/b --p2 0.1", "--client: 'a/b' is not a client id;"),
    (f"{QUANTIZE} --format nf5", "--format: 'nf5' is not a choice; did you mean nf4? choose from nf4, fp4, int8, nf3,"),
    (f"{QUANTIZE} --block-size 63", "--block-size: 63 is not a block size; give a power of two from 32 to 4096"),
    (f"{QUANTIZE} --block-size 16", "--block-size: 16 is not a block size;"),
    (f"{QUANTIZE} --block-size 6.5", "--block-size: '6.5' is not a whole number;"),
    (f"{QUANTIZE} --layout gguf", "--layout: 'gguf' is not a choice; choose from bnb, dense"),
    ("quantize model --out out", "missing --format;"),
    (f"{EXPORT} --p2 2", "--p2: 2.0 is not a ratio;"),
    (f"{EXPORT} --round -1", "--round: -1 is not 0 or more;"),
    (f"{EXPORT} --round one", "--round: 'one' is not a whole number;"),
    (f"{EXPORT} --client=..", "--client: '..' is not a client id;"),
    (f"{EXPORT} --schedule never", "--schedule: 'never' is not a choice;"),
    ("export-proxy model --out out", "missing --client;"),
    (f"{TRAIN} --epochs 0", "--epochs: 0 is not a positive number;"),
    (f"{TRAIN} --lr inf", "--lr: inf is not a positive number;"),
    (f"{TRAIN} --batch-size 0", "--batch-size: 0 is not 1 or more;"),
    (f"{TRAIN} --warmup-ratio 1.5", "--warmup-ratio: 1.5 is out of range; give a number from 0 to 1"),
    (f"{TRAIN} --weight-decay -1", "--weight-decay: -1 is not 0 or more;"),
    (f"{TRAIN} --precision fp64", "--precision: 'fp64' is not a choice;"),
    ("client-train proxy --out out", "missing --data;"),
    (f"{MERGE} --normalize median", "--normalize: 'median' is not a choice;"),
    (f"{MERGE} --server-lr 0", "--server-lr: 0 is not a positive number;"),
    (f"{MERGE} --blend 2", "--blend: 2 is out of range;"),
    ("merge model update --out out", "missing --key (or set FEDQSN_KEY); see 'fedqsn merge --help'"),
    ("mask model --out out", "missing --key (or set FEDQSN_KEY); see 'fedqsn mask --help'"),
    (EXPORT.replace(" --ledger ledger.jsonl", ""), "missing --ledger (or set FEDQSN_LEDGER);"),
    (
        MERGE.replace(" --ledger ledger.jsonl", ""),
        "--ledger: merging updates needs the ledger of their releases; give --ledger, or set FEDQSN_LEDGER",
    ),
    (f"{EVALUATE} --max-length 0", "--max-length: 0 is not 1 or more;"),
    ("evaluate model", "missing --data;"),
    (f"{INSPECT} --axis diagonal", "--axis: 'diagonal' is not a choice;"),
    (f"{INSPECT} other", "unexpected argument other;"),
]


def check(outcome: Outcome, expected: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"fedqsn: error: {expected}"), outcome.err


@pytest.mark.parametrize(("line", "expected"), WRONG, ids=[line[:60] or "nothing" for line, _ in WRONG])
def test_wrong_use_is_one_line_with_the_fix(
    line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(run(*shlex.split(line)), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [MASK, QUANTIZE, EXPORT, TRAIN, MERGE, EVALUATE, INSPECT])
def test_a_model_that_is_not_there_is_one_line(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*shlex.split(line))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_as_a_process_refuses_an_unknown_option(command: str) -> None:
    check(process(command, "--no-such-thing"), "no such option --no-such-thing; see")
