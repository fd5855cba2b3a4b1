#!/usr/bin/env bash
# One owner, four clients and three rounds of FedQSN on a real model. README.md beside this file tells the story.
#
#   ./run.sh                      the whole job, into work/
#   COMPARE=1 ./run.sh            and the same with plain FedAvg: nothing hidden, nothing quantized
#   P1=0.5 FILL=base ./run.sh     with other settings: see below
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK=${WORK:-work}               # everything is written here
P1=${P1:-0.1}                    # share of all neurons that no client ever gets
P2=${P2:-0.1}                    # share of the others that one client does not get in one round
FORMAT=${FORMAT:-nf4}            # number format of what clients get
FILL=${FILL:-zero}               # what stands in the holes: zero, or base (the public model's neurons)
ROUNDS=${ROUNDS:-3}
EPOCHS=${EPOCHS:-1}              # of every client in every round
LR=${LR:-1e-4}
MAX_LENGTH=${MAX_LENGTH:-64}     # tokens: the title and the first lines of an article
SERVER_LR=${SERVER_LR:-1}
CLIENTS=(alice bob carol dave)

# Clients work at the same time, as they would on machines of their own; here they share this one's cores.
cores=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$((cores < ${#CLIENTS[@]} ? cores : ${#CLIENTS[@]}))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}

say() { printf '\n== %s\n' "$*" >&2; }

for_each_client() { # COMMAND...; {} stands for the client's name. Fails when any of them fails.
    printf '%s\n' "${CLIENTS[@]}" | xargs -P "$JOBS" -I '{}' bash -euc "$*"
}

# Score the model after a round: the owner's whole model, and what is left of it when the job's neurons are hidden.
score() { # GLOBAL ROUND_FOLDER MASK_OPTION...
    local global=$1 round=$2
    shift 2
    mkdir -p "$round/scores"
    fedqsn mask "$global" --out "$round/server" --key "$round/../job.key" --quiet "$@"
    fedqsn inspect "$round/server" --json >"$round/scores/inspect.json"
    fedqsn evaluate "$global" --data "$WORK/data/test.jsonl" --max-length "$MAX_LENGTH" --json >"$round/scores/global.json"
    fedqsn evaluate "$round/server" --data "$WORK/data/test.jsonl" --max-length "$MAX_LENGTH" --json >"$round/scores/server.json"
}
