#!/usr/bin/env bash
# The tests as on other machines, as far as this one can stand for them. `make matrix` runs it, and so does `make soak`.
#
#   tests/matrix.sh PYTHON [NAME...]     only these of: no-avx2 avx2 one-core four-workers c-locale umask-nohup disk new-examples
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
shift

# Whose numbers come from torch, bitsandbytes or compiled kernels.
numbers=(tests/quantization tests/training tests/invariants/test_i9_bitsandbytes.py tests/models
    tests/merging/test_merge_auto.py tests/auditing/test_function.py tests/auditing/test_attacks.py)
# Which look at processes, files, terminals and text.
system=(tests/cli tests/checkpoint tests/auditing/test_ci_examples.py tests/auditing/test_cli_audit.py tests/documentation
    tests/invariants/test_i4_determinism.py tests/invariants/test_i5_no_secrets_out.py tests/invariants/test_i6_all_or_nothing.py
    tests/invariants/test_i10_bounded_memory.py tests/masks/test_job_key.py tests/artifacts/test_ledger.py tests/export/test_server_model.py)
wanted=" $* "
failed=()

# on NAME COMMAND...: run it, unless others were asked for.
on() {
    local name=$1
    shift
    [[ -z ${wanted// /} || $wanted == *" $name "* ]] || return 0
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

try() { "$python" -m pytest -q --dist worksteal "$@"; }
one_core() { taskset --cpu-list "$("$python" -c 'import os; print(min(os.sched_getaffinity(0)))')" "$python" -m pytest -q "$@"; }
shut() { (umask 077 && trap '' HUP INT && try "$@" </dev/null); }
on_disk() { PYTEST_DEBUG_TEMPROOT=${TMPDIR:-/tmp} try "$@"; } # else they write into memory, if there is room

on no-avx2 env ATEN_CPU_CAPABILITY=default "$python" -m pytest -q -n auto --dist worksteal "${numbers[@]}"
on avx2 env ATEN_CPU_CAPABILITY=avx2 "$python" -m pytest -q -n auto --dist worksteal "${numbers[@]}"
on one-core one_core "${system[@]}" "${numbers[@]}"
on four-workers try -n 4 --hypothesis-profile soak tests
on c-locale env LC_ALL=C PYTHONUTF8=0 "$python" -m pytest -q -n auto --dist worksteal "${system[@]}" tests/training
on umask-nohup shut -n auto "${system[@]}"
on disk on_disk -n auto tests/checkpoint tests/cli tests/export/test_server_model.py tests/export/test_proxy.py
on new-examples try -n auto --hypothesis-profile explore --chance new tests -k "not examples and not study and not benchmarks"

((${#failed[@]} == 0)) || { echo "== failed: ${failed[*]}" >&2; exit 1; }
echo "== all passed"
