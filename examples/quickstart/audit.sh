#!/usr/bin/env bash
# What leaked in the last round of the demo? Prints the report, writes work/report.html, and exits with the code of the
# audit: 0 within policy.toml, 1 over a limit, 3 incomplete, 4 a hard invariant is broken.
#
#   ./audit.sh                    after ./run.sh with TRAIN=visible, and with the same WORK
#   POLICY=strict.toml ./audit.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK=${WORK:-work}
POLICY=${POLICY:-policy.toml}
job=$WORK/fedqsn

[[ -e $job/ledger.jsonl ]] || { echo "audit.sh: there is no job in $job; run ./run.sh (make demo) first" >&2; exit 2; }
last=0
while [[ -d $job/r$((last + 1))/proxies ]]; do last=$((last + 1)); done

# global_after N: the global model after N rounds: the owner's hidden neurons, and what was trained of the others.
global_after() {
    [[ $1 -gt 0 ]] || { echo "$WORK/owner"; return; }
    [[ -d $job/r$1/global ]] ||
        fedqsn merge "$WORK/owner" --restore "$job/r$1/server" --out "$job/r$1/global" --key "$job/job.key" --quiet >&2
    echo "$job/r$1/global"
}

exec fedqsn audit "$job/r$last"/proxies/*/ --truth "$(global_after $((last - 1)))" --after "$(global_after "$last")" \
    --key "$job/job.key" --ledger "$job/ledger.jsonl" --public-base "$WORK/base" \
    --eval-data "$WORK/data/test.jsonl" --public-data "$WORK/data/owner.jsonl" --policy "$POLICY" --report "$WORK/report.html" "$@"
