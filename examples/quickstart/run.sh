#!/usr/bin/env bash
# One owner, four clients and three rounds of FedQSN on a real model. README.md beside this file tells the story.
#
#   ./run.sh                      the whole job, into work/
#   COMPARE=1 ./run.sh            and the same with plain FedAvg: nothing hidden, nothing quantized
#   P1=0.5 FILL=base ./run.sh     with other settings
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK=${WORK:-work}               # everything is written here
P1=${P1:-0.1}                    # share of all neurons that no client ever gets
P2=${P2:-0.1}                    # share of the others that one client does not get in one round
FORMAT=${FORMAT:-nf4}            # number format of what clients get
FILL=${FILL:-zero}               # what stands in the holes: zero, or base (the public model's own neurons)
ROUNDS=${ROUNDS:-3}
EPOCHS=${EPOCHS:-1}              # of every client in every round
LR=${LR:-1e-4}
SERVER_LR=${SERVER_LR:-1}
MAX_LENGTH=${MAX_LENGTH:-64}     # tokens: the title and the first lines of an article
CLIENTS=(alice bob carol dave)

say() { printf '== %s\n' "$*"; }

# score MODEL NAME: measure a model or proxy on the test articles, for the table at the end.
score() {
    mkdir -p "$round/scores"
    fedqsn evaluate "$1" --data "$WORK/data/test.jsonl" --max-length "$MAX_LENGTH" --json >"$round/scores/$2.json"
    fedqsn inspect "$1" --json >"$round/scores/$2.inspect.json"
}

# What the server does with a global model before a round, and after the last: hide the job's neurons, and measure.
open_round() {
    fedqsn mask "$global" --out "$round/server" --key "$job/job.key" --p1 "$p1" "${mask_options[@]}" --quiet
    score "$global" global
    score "$round/server" server
}

# play NAME P1 P2 FORMAT FILL: a whole job in $WORK/NAME. Folder rN holds what belongs to the model after N rounds.
play() {
    local job=$WORK/$1 p1=$2 p2=$3 format=$4 global=$WORK/owner round=$WORK/$1/r0 client n
    local mask_options=(--fill "$5")
    [[ $5 == zero ]] || mask_options+=(--public-base "$WORK/base")
    local names=("${CLIENTS[@]/#/--client=}")

    rm -rf "$job" # of an earlier run; within $WORK, and always one of this script's own two jobs
    mkdir -p "$job"
    open_round
    for ((n = 1; n <= ROUNDS; n++)); do
        local server=$round/server
        round=$job/r$n
        say "$1, round $n of $ROUNDS: the owner makes four proxies"
        fedqsn export-proxy "$server" --out "$round/proxies/{client}" "${names[@]}" --round "$n" \
            --p2 "$p2" --format "$format" --key "$job/job.key" --ledger "$job/ledger.jsonl" --quiet

        for client in "${CLIENTS[@]}"; do
            say "$1, round $n of $ROUNDS: $client trains on articles that nobody else sees"
            fedqsn client-train "$round/proxies/$client" --out "$round/updates/$client" --data "$WORK/data/$client.jsonl" \
                --epochs "$EPOCHS" --lr "$LR" --max-length "$MAX_LENGTH" --seed "$n" --quiet
            score "$round/proxies/$client" "$client"
        done

        say "$1, round $n of $ROUNDS: the owner merges four updates"
        fedqsn merge "$global" "${CLIENTS[@]/#/$round/updates/}" --out "$round/global" \
            --server-lr "$SERVER_LR" --key "$job/job.key" --ledger "$job/ledger.jsonl" --quiet
        global=$round/global
        open_round
    done
}

python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.txt
mkdir -p "$WORK"
python prepare.py --out "$WORK"
say "the owner fine-tunes the public base on articles of his own"
python owner_finetune.py --base "$WORK/base" --data "$WORK/data/owner.jsonl" --out "$WORK/owner" --max-length "$MAX_LENGTH"

play fedqsn "$P1" "$P2" "$FORMAT" "$FILL"
[[ -z ${COMPARE:-} ]] || play fedavg 0 0 none zero

python report.py "$WORK/fedqsn" ${COMPARE:+"$WORK/fedavg"}
