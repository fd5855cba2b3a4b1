#!/usr/bin/env bash
# FedQSN on a data set of the paper: prepare, mask, train in rounds, restore, measure. README.md explains it.
#
#   ./run.sh rte                          RoBERTa from the hub, into work/rte
#   ROUNDS=10 LIMIT=2000 ./run.sh viggo   GPT-2, on a part of the data
#   SOURCE=files MODEL=model ./run.sh rte offline
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

NAME=${1:?name a data set: rte sst2 mrpc qqp qnli e2e dart dialogsum viggo}
WORK=${WORK:-work}
P1=${P1:-0.1}                    # share of all neurons that no client ever gets
P2=${P2:-0.1}                    # share of the others that one client does not get in one round
FORMAT=${FORMAT:-nf4}
WHERE=${WHERE:-outputs}          # as in the paper; all hides more
ROUNDS=${ROUNDS:-5}
EPOCHS=${EPOCHS:-1}              # of every client in every round
LR=${LR:-2e-5}
METHOD=${METHOD:-full}           # full or lora
MAX_LENGTH=${MAX_LENGTH:-256}
read -ra CLIENTS <<<"${CLIENTS:-alice bob carol dave}"

JOB=$WORK/$NAME
SECRETS=(--key "$JOB/job.key" --ledger "$JOB/ledger.jsonl")
GENERATE=()
case $NAME in e2e | dart | dialogsum | viggo) GENERATE=(--generate) ;; esac

python prepare.py "$NAME" --out "$JOB" --clients "${CLIENTS[@]}" \
    ${SOURCE:+--source "$SOURCE"} ${MODEL:+--model "$MODEL"} ${LIMIT:+--limit "$LIMIT"}

fedqsn mask "$JOB/global" --out "$JOB/server-0" --p1 "$P1" --where "$WHERE" --key "$JOB/job.key"
for ((n = 1; n <= ROUNDS; n++)); do
    fedqsn export-proxy "$JOB/server-$((n - 1))" --out "$JOB/r$n/proxies/{client}" "${CLIENTS[@]/#/--client=}" \
        --round "$n" --p2 "$P2" --format "$FORMAT" "${SECRETS[@]}"
    for client in "${CLIENTS[@]}"; do
        fedqsn client-train "$JOB/r$n/proxies/$client" --out "$JOB/r$n/updates/$client" --data "$JOB/data/$client.jsonl" \
            --method "$METHOD" --epochs "$EPOCHS" --lr "$LR" --max-length "$MAX_LENGTH" --seed "$n"
    done
    fedqsn merge "$JOB/server-$((n - 1))" "${CLIENTS[@]/#/$JOB/r$n/updates/}" --out "$JOB/server-$n" "${SECRETS[@]}"
done
fedqsn merge "$JOB/global" --restore "$JOB/server-$ROUNDS" --out "$JOB/final" --key "$JOB/job.key"

for model in global "server-$ROUNDS" final; do
    fedqsn evaluate "$JOB/$model" --data "$JOB/data/dev.jsonl" --max-length "$MAX_LENGTH" "${GENERATE[@]}"
done
