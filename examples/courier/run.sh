#!/usr/bin/env bash
# Two rounds over NVIDIA FLARE on one machine: an owner and three sites, real processes, mutual TLS, no network.
# In the first round bob's site is killed while it works, and starts again; carol's site never answers.
#
#   ./run.sh            into work/
#   PORT=9000 ./run.sh  with another port of the server
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK=${WORK:-work}
PORT=${PORT:-8102}
ROUNDS=${ROUNDS:-2}
DEADLINE=${DEADLINE:-10m}
EPOCHS=${EPOCHS:-3}

say() { printf '\n== %s\n' "$*"; }

mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
secrets=(--key "$WORK/job.key" --ledger "$WORK/ledger.jsonl")

say "A model and data that need no network"
python prepare.py "$WORK" alice bob carol

say "The owner sets up the courier, with the three sites on this machine"
fedqsn keygen "$WORK/owner.key"
fedqsn courier init "$WORK/courier" --server "localhost:$PORT" --key "$WORK/owner.pub" \
    --local alice --local bob --local carol
for client in alice bob carol; do
    mv "$WORK/$client.jsonl" "$WORK/courier/sites/$client/"
done

say "The server and two of the sites start; carol's does not"
served=("$WORK/courier" "$WORK/courier/sites/alice" "$WORK/courier/sites/bob")
stop() { for folder in "${served[@]}"; do fedqsn courier stop "$folder" --quiet >/dev/null; done; }
trap stop EXIT
fedqsn courier serve "$WORK/courier" --server-only --quiet >/dev/null &
fedqsn courier serve "$WORK/courier/sites/alice" --quiet >/dev/null &
fedqsn courier serve "$WORK/courier/sites/bob" --quiet >/dev/null &

# Kill every process of a site that FLARE runs, once its training was asked for; the supervisor starts it again.
kill_in_the_middle() {
    local site=$1
    until grep -q 'asked to train' "$site/courier.log" 2>/dev/null; do sleep 0.2; done
    say "bob's site is killed"
    pgrep -f "$site/kit" | xargs -r kill -9
}

ln -s global "$WORK/model-0"
for ((n = 1; n <= ROUNDS; n++)); do
    say "Round $n: proxies are exported, audited, and attested"
    fedqsn export-proxy "$WORK/model-$((n - 1))" --out "$WORK/round-$n/proxies/{client}" \
        --client alice --client bob --client carol --round "$n" \
        --p1 0.1 --p2 0.1 "${secrets[@]}" --sign "$WORK/owner.key"
    fedqsn audit "$WORK/round-$n/proxies"/* --truth "$WORK/model-$((n - 1))" "${secrets[@]}" --policy policy.toml \
        --sign "$WORK/owner.key" --attest "$WORK/round-$n/audit.intoto.json" --quiet

    say "Round $n: they are sealed for their clients, with what these are asked to train"
    fedqsn courier pack "$WORK/courier" "$WORK/round-$n/proxies"/* --out "$WORK/round-$n/outbox" \
        --key "$WORK/owner.key" --ledger "$WORK/ledger.jsonl" --policy policy.toml \
        --attestation "$WORK/round-$n/audit.intoto.json" --epochs "$EPOCHS" --lr 1e-3

    say "Round $n: proxies go out, and updates come back; two of three are enough"
    if ((n == 1)); then kill_in_the_middle "$WORK/courier/sites/bob" & fi
    fedqsn courier send "$WORK/courier" "$WORK/round-$n/outbox" --into "$WORK/round-$n/updates" \
        --key "$WORK/owner.key" --at-least 2 --deadline "$DEADLINE"

    say "Round $n: the owner merges what the two clients have signed"
    fedqsn merge "$WORK/model-$((n - 1))" "$WORK/round-$n/updates"/* --out "$WORK/model-$n" "${secrets[@]}" \
        --verify-key "$WORK/courier/keys/{client}.pub"
done

say "What was learnt"
for ((n = 0; n <= ROUNDS; n++)); do
    fedqsn evaluate "$WORK/model-$n" --data "$WORK/dev.jsonl" --max-length 32 --quiet
done
